"""Triton kernels over a paged cache. Each that Triton loads from its cache is looked at first."""

from triton import knobs

from kvbench_kernels.loading import refuse_cut_off

knobs.runtime.kernel_load_start_hook.add(refuse_cut_off)
