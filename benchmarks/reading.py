"""How fast a GPU reads a trellis: python benchmarks/reading.py [OUT.json].

537 million values, the keys and values of 32 sequences of 8192 tokens with 8 KV heads and head_dim 128, are read from
memory, decoded in ways that a decode kernel might take, and multiplied by a query's eight heads, as a kernel would (an
mma's operand in registers). Each way must first give the definition's values, bit for bit, of every window of 14 bits
at every place and of random rows; Triton's, which add up what they look up, the right sum. Its prediction, from
operations over rates, stands beside what was measured. Beside them: a copy of as many bytes, and the decode kernels of
int2 and of 16 bits, which do softmax and outputs too.

The last rows are a whole decode step over such rows, by the fastest way: queries turned, scores, softmax, outputs,
splits merged and turned back. It must agree with float64.

Needs a GPU with CUDA 9.0's matrix products. Ways in CUDA are built by NVRTC from reading.cu.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from kvbench_kernels.hadamard import Turn, rotate
from kvbench_kernels.merge import merge
from torch import Tensor

from kvbench.attention import trellis as trellis_kernels
from kvbench.dtypes import all_dtypes
from kvbench.dtypes.base import Rows
from kvbench.dtypes.trellis import TrellisPerTokenHead, steps_of, table
from kvbench.environment import describe
from kvbench.timing import KernelRequest, run
from kvbench.timing.clock import cold_copies, copy_bandwidth, time_calls

SOURCE = Path(__file__).with_suffix(".cu")
HEAD_DIM = 128
BATCH, CONTEXT, KV_HEADS, QUERY_HEADS, PAGE = 32, 8192, 8, 32, 64
ROWS = 2 * BATCH * CONTEXT * KV_HEADS
HEADS = 8  # of the query
LARGEST = 2000  # of the query's whole numbers: exact in fp16, and in two signed bytes
PARTS = ("read", "decode", "peers", "more", "triton")
PEER = KernelRequest(("fp16", "int2"), batches=(BATCH,), contexts=(CONTEXT,))

# of an H100 or H200, per clock: of a multiprocessor, lanes that whole numbers and all instructions have, and that a
# turn of shared memory serves
MULTIPROCESSORS, GHZ = 132, 1.96
INTEGER, ISSUED, BANKS = 64, 128, 32
COPY_SHARE = 1.05  # of a copy's rate, that reading alone reaches

MASKS, CURVE, VALUES, PAIRS, TRIPLES, QUADS, HALVES = range(7)  # as reading.cu has them
TAKES = {VALUES: 1, PAIRS: 2, TRIPLES: 3, QUADS: 4, HALVES: 4}


@dataclass(frozen=True)
class Way:
    """A way of decoding, and what it takes for a value.

    copies: of the table, interleaved, a lane reads its own; 32 never meet in a bank.  cached: it is read through the
        L1 cache.  threads: of a block, one a multiprocessor.  depth: tiles that a warp has room for.
    integer: instructions of the integer ALU, a lane's. issued: of all kinds. turns: of shared memory or the L1 cache,
        a warp's; with as many bytes, that is the prediction.
    """

    name: str
    dtype: str
    kind: int
    integer: float
    issued: float
    copies: int = 1
    cached: bool = False
    threads: int = 768
    depth: int = 4
    multiplied: bool = False  # shifts are multiplications where they can be
    early: bool = False  # values are looked up before weights are known
    together: int = 1  # tiles that share a look at the maximum

    @property
    def takes(self) -> int:
        return TAKES.get(self.kind, 1)

    @property
    def bits(self) -> int:
        return int(self.dtype.removeprefix("tcq"))

    @property
    def window(self) -> int:
        return 8 + self.bits * (self.takes - 1)

    @property
    def whole(self) -> bool:
        return self.kind in (TRIPLES, QUADS)

    @property
    def looks(self) -> bool:
        return self.kind in TAKES

    def shared(self, decode: bool) -> int:
        """Bytes of shared memory: the table, and the warps' tiles of keys, or of both."""
        own = 0 if self.cached or not self.looks else 4 * self.copies << self.window
        tile = 16 * (HEAD_DIM * self.bits // 8 + 2)
        return own + self.threads // 32 * self.depth * self.together * tile * (2 if decode else 1)

    @property
    def turns(self) -> float:
        """Of a value: what its lookup takes in the mean, of random windows."""
        return turns(self.copies, self.cached, self.window) / self.takes if self.looks else 0.0

    def predicted(self, read_gbps: float) -> dict[str, float]:
        """Microseconds that each part would take alone; the longest is the prediction."""
        clocks = ROWS * HEAD_DIM / MULTIPROCESSORS / GHZ / 1e3
        return {
            "memory": nbytes(self.bits) / read_gbps / 1e3,
            "integer": self.integer * clocks / INTEGER,
            "issued": self.issued * clocks / ISSUED,
            "lookups": self.turns * clocks / BANKS,
        }


def nbytes(bits: int) -> int:
    """Of all rows with their scales."""
    return ROWS * (HEAD_DIM * bits // 8 + 2)


def turns(copies: int, cached: bool, window: int) -> float:
    """Turns of 32 lanes at random entries: of words of one bank, or of lines of the L1 cache, of 128 bytes."""
    draw = random.Random(0)
    total = 0
    for _ in range(1000):
        places = {draw.randrange(1 << window) * copies + lane % copies for lane in range(32)}
        if cached:
            total += len({place // 32 for place in places})
        else:
            total += max(Counter(place % 32 for place in places).values())
    return total / 1000


# a shift and a mask a lookup; the rest is a row's: the string's words in order, its scale, products and the tile's own
WAYS = (
    Way("masks of codes of 2 bits, no trellis", "tcq2", MASKS, 0.6, 0.8),
    Way("2 a lookup, 32 tables", "tcq2", PAIRS, 1.1, 1.8, 32),
    Way("2 a lookup, 32 tables, multiplied", "tcq2", PAIRS, 0.8, 1.9, 32, multiplied=True),
    Way("2 a lookup, 32 tables, 512 threads", "tcq2", PAIRS, 1.1, 1.8, 32, threads=512),
    Way("4 a lookup, as int8", "tcq2", QUADS, 0.6, 1.0, 1),
    Way("polynomial", "tcq2", CURVE, 3.1, 7.7),
)
MORE = (
    Way("1 a lookup, 32 tables", "tcq2", VALUES, 2.6, 3.8, 32),
    Way("2 a lookup, 1 table", "tcq2", PAIRS, 1.1, 1.8, 1),
    Way("2 a lookup, 8 tables", "tcq2", PAIRS, 1.1, 1.8, 8),
    Way("3 a lookup, as int8", "tcq2", TRIPLES, 1.1, 1.6, 1),
    Way("4 a lookup, as int8, 2 tables", "tcq2", QUADS, 0.6, 1.0, 2),
    Way("4 a lookup, to fp16", "tcq2", HALVES, 1.1, 2.0, 1),
    Way("1 a lookup, L1", "tcq2", VALUES, 2.6, 5.3, 1, cached=True),
    Way("2 a lookup, L1", "tcq2", PAIRS, 1.1, 2.8, 1, cached=True),
    Way("4 a lookup, as int8, L1", "tcq2", QUADS, 0.6, 1.5, 1, cached=True),
    Way("1 a lookup, 32 tables", "tcq4", VALUES, 2.6, 3.8, 32, threads=512),
    Way("2 a lookup, 8 tables", "tcq4", PAIRS, 1.2, 1.9, 8, threads=512),
)
# a whole step has softmax, the tile's pages and scales, and products of weights besides
STEP = partial(Way, dtype="tcq2", kind=PAIRS, integer=1.3, issued=2.2, copies=32)
DECODES = (
    STEP("decode, 512 threads", threads=512),
    STEP("decode, 512 threads, early", threads=512, early=True),
    STEP("decode, 512 threads, 2 tiles together", threads=512, depth=2, together=2),
    STEP("decode, 640 threads", threads=640),
    STEP("decode, 640 threads, early", threads=640, early=True),
    STEP("decode, 640 threads, 2 tiles together", threads=640, depth=2, together=2),
    STEP("decode, 640 threads, multiplied", threads=640, integer=1.0, multiplied=True),
    STEP("decode, 768 threads", threads=768, depth=3),
)


# ---- rows, and what they are worth


def dtype_of(name: str) -> TrellisPerTokenHead:
    dtype = all_dtypes()[name]
    assert isinstance(dtype, TrellisPerTokenHead)
    return dtype


def random_rows(dtype: TrellisPerTokenHead, rows: int, seed: int, exponent: int = 0) -> Rows:
    """Random strings, with scales around 2^exponent."""
    made = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 256, (rows, dtype.code_bytes(HEAD_DIM)), dtype=torch.uint8, device="cuda", generator=made)
    start, mantissa = dtype.start_bits, dtype.scale_form[0]
    low = torch.randint(0, 1 << start, (rows,), dtype=torch.int32, device="cuda", generator=made)
    one = (dtype.scale_form[1] + exponent) << mantissa
    around = (one - (1 << mantissa), one + (1 << mantissa))
    code = torch.randint(*around, (rows,), dtype=torch.int32, device="cuda", generator=made)
    return Rows(codes, ((code << start) | low).to(torch.int16))


def hard_rows(dtype: TrellisPerTokenHead) -> Rows:
    """Every window of 14 bits, one after the other all along a row, under every scale; then random rows."""
    bit = torch.arange(HEAD_DIM * dtype.code_bits, device="cuda")
    every = torch.arange(1 << 14, device="cuda")[:, None]
    bits = ((every >> (13 - bit % 14)) & 1).view(1 << 14, -1, 16)
    words = (bits << torch.arange(15, -1, -1, device="cuda")).sum(-1).to(torch.int16)
    scale = torch.arange(1 << 14, device="cuda").mul(37).to(torch.int16)
    more = random_rows(dtype, 1 << 14, 1)
    assert more.scale is not None
    return Rows(torch.cat([words.view(torch.uint8), more.codes]), torch.cat([scale, more.scale]))


def values_of(dtype: TrellisPerTokenHead, rows: Rows) -> Tensor:
    """[N, D] int32 whole numbers, by the definition: its rows with the scale 1."""
    assert rows.scale is not None
    start, mantissa = dtype.start_bits, dtype.scale_form[0]
    one = (rows.scale.to(torch.int32) & ((1 << start) - 1)) | (dtype.scale_form[1] << mantissa << start)
    return dtype.dequantize(Rows(rows.codes, one.to(torch.int16))).to(torch.int32)


def entries(way: Way) -> Tensor:
    """[2^window] int32, the table's words."""
    values = table(dtype_of(way.dtype).trellis, torch.int32, torch.device("cpu"))[0]
    window = torch.arange(1 << way.window)
    each = [values[(window >> way.bits * (way.takes - 1 - i)) & 255] for i in range(way.takes)]
    if way.kind in (VALUES, PAIRS):
        parts, width = [x.to(torch.float16).view(torch.int16).to(torch.int64) & 0xFFFF for x in each], 16
    else:
        above = 128 if way.kind == HALVES else 0
        parts, width = [(x + above).to(torch.int64) & 0xFF for x in each], 8
    word = torch.stack([part << width * i for i, part in enumerate(parts)]).sum(0)
    return word.to(torch.int32)


def places(way: Way) -> list[list[int]]:
    """Of each register, which of a lane's 32 values that follow each other it has, the lowest bits first."""
    if way.whole:
        return [list(range(4 * i, 4 * i + 4)) for i in range(8)]
    if way.kind == CURVE:
        return [[16 * (i // 8) + i % 8 + 8, 16 * (i // 8) + i % 8] for i in range(16)]
    return [[2 * i, 2 * i + 1] for i in range(16)]


def order_of(way: Way, device: torch.device) -> Tensor:
    """[D]: the channels in the order of a row's string."""
    return steps_of(dtype_of(way.dtype).trellis, HEAD_DIM, device).channel


def channels(way: Way) -> Tensor:
    """[4, registers, 2 or 4]: of each of a row's four lanes, the channels that its registers have."""
    return order_of(way, torch.device("cpu")).view(4, 32)[:, torch.tensor(places(way))]


def operand(way: Way, query: Tensor) -> Tensor:
    """[registers, 32 lanes] int32 of the query [HEADS, D] of whole numbers; of int8 first the upper bytes."""
    mine = query[:, channels(way)].permute(2, 0, 1, 3).reshape(-1, 32, 4 if way.whole else 2).contiguous()
    if not way.whole:
        return mine.to(torch.float16).view(torch.int32)[..., 0].contiguous()
    upper = (mine + 128) >> 8
    both = torch.cat([upper, mine - (upper << 8)]).to(torch.int8)
    return both.contiguous().view(torch.int32)[..., 0].contiguous()


# ---- kernels


def build(way: Way, dump: bool = False, decode: bool = False) -> bytes:
    """The program's cubin.

    Raises:
        RuntimeError: NVRTC refuses it.
    """
    from torch.cuda._utils import _get_nvrtc_library

    library = _get_nvrtc_library()
    macros = {"BITS": way.bits, "KIND": way.kind, "COPIES": way.copies, "THREADS": way.threads, "DEPTH": way.depth}
    macros |= {
        "MULTIPLIED": int(way.multiplied),
        "EARLY": int(way.early),
        "TOGETHER": way.together,
        "CACHED": int(way.cached),
        "DUMP": int(dump),
        "DECODE": int(decode),
    }
    options = [b"--gpu-architecture=sm_90", b"--std=c++17", *(f"-D{k}={v}".encode() for k, v in macros.items())]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), b"reading.cu", 0, None, None)
    if library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    return cubin.raw


class Reader:
    """A way, built and loaded."""

    def __init__(self, way: Way, cubin: bytes, name: str = "read_rows") -> None:
        from torch.cuda._utils import _cuda_load_module

        self.way = way
        loaded = _cuda_load_module(cubin, [name])
        assert isinstance(loaded, dict)
        self.kernel = loaded[name]
        self.shared = way.shared(name == "decode_rows")
        if self.shared >= 48 * 1024:
            self.kernel.set_shared_memory_config(self.shared)
        words = entries(way) if way.looks else torch.zeros(1, dtype=torch.int32)
        self.table = (words.repeat_interleave(way.copies) if way.cached else words).cuda()

    def launch(self, arguments: list[Any]) -> None:
        self.kernel((MULTIPROCESSORS, 1, 1), (self.way.threads, 1, 1), arguments, self.shared)

    def __call__(self, rows: Rows, query: Tensor, sums: Tensor, values: Tensor) -> None:
        arguments = [rows.codes, rows.scale, query, self.table, sums, values, len(rows.codes) // 16]
        self.launch(arguments)


def check_values(reader: Reader, rows: Rows, want: Tensor) -> bool:
    """Whether every value of the rows is the definition's."""
    way = reader.way
    count = 8 if way.whole else 16
    nothing = torch.zeros(16 * 32, dtype=torch.int32, device="cuda")
    got = torch.zeros(len(rows.codes), 4, count, dtype=torch.int32, device="cuda")
    reader(rows, nothing, nothing, got)
    numbers = got.view(torch.int8 if way.whole else torch.float16).view(len(got), 4, count, -1)
    back = torch.empty_like(want)
    back[:, channels(way).flatten().cuda()] = numbers.flatten(1).to(torch.int32)
    return torch.equal(back, want)


def expected(dtype: TrellisPerTokenHead, rows: Rows, query: Tensor) -> tuple[Tensor, float]:
    """[HEADS] float64: sums of all rows' products with the query, and what they may differ by."""
    total, square = torch.zeros(HEADS, dtype=torch.float64, device="cuda"), 0.0
    assert rows.scale is not None
    for codes, scale in zip(rows.codes.split(1 << 18), rows.scale.split(1 << 18), strict=True):
        x = trellis_kernels.dequantize(dtype, Rows(codes, scale), HEAD_DIM).double()
        scores = x @ query.double().T
        total += scores.sum(0)
        square += float(scores.square().sum() / HEADS)
    return total, 1e-5 * square**0.5


@triton.jit
def gather_kernel(
    word_ptr,  # [rows, 8] int32
    start_ptr,  # [rows] int16
    table_ptr,  # [2^(8 + 2 (TAKES - 1))] int32
    sum_ptr,  # [programs] int32
    count,  # tiles a program
    TAKES: tl.constexpr,  # noqa: N803 - a constant
    R: tl.constexpr,  # noqa: N803
    COPIES: tl.constexpr,  # noqa: N803 - of the table in shared memory, 32 KB in all; 0: it is read through the L1 cache
):
    """Sums of what the table has for all windows, modulo 2^32: of codes of 2 bits, TAKES values an entry.

    Triton gives a program no such table, but its assembly may declare one, of 48 KB at most.
    """
    ENTRIES: tl.constexpr = 1 << (8 + 2 * (TAKES - 1))  # noqa: N806
    if COPIES:
        thread = tl.arange(0, 128)
        tl.inline_asm_elementwise(
            ".shared .align 16 .b32 trellis_table[8192];\nmov.b32 $0, 0;", "=r,r", [thread], tl.int32, False, 1
        )
        for i in range(ENTRIES * COPIES // 128):
            at = i * 128 + thread
            tl.inline_asm_elementwise(
                "{\n.reg .b32 at;\nmov.u32 at, trellis_table;\nadd.u32 at, at, $1;\nst.shared.b32 [at], $2;\n"
                "mov.b32 $0, 0;\n}",
                "=r,r,r",
                [at * 4, tl.load(table_ptr + at // COPIES)],
                tl.int32,
                False,
                1,
            )
        tl.debug_barrier()
    row = tl.program_id(0).to(tl.int64) * count * R + tl.arange(0, R)
    chunk = tl.arange(0, 8)[None, :]
    total = tl.zeros([R, 8], tl.int32)
    for i in range(count):
        at = word_ptr + (row + i * R)[:, None] * 8 + chunk
        word = tl.load(at)
        before = tl.load(at - 1, mask=chunk > 0, other=0)
        start = tl.load(start_ptr + row + i * R).to(tl.int32)[:, None] & 63
        before = tl.where(chunk > 0, (before >> 16) & 0xFFFF, start)
        word = ((word >> 16) & 0xFFFF) | (word << 16)
        both = (before.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
        for j in tl.static_range(16 // TAKES):
            window = (both >> (32 - 2 * TAKES * (j + 1))).to(tl.int32) & (ENTRIES - 1)
            if COPIES:
                total += tl.inline_asm_elementwise(
                    "{\n.reg .b32 at, lane;\nmov.u32 lane, %laneid;\nand.b32 lane, lane, $2;\n"
                    "mad.lo.u32 at, lane, 4, $1;\nmov.u32 lane, trellis_table;\nadd.u32 at, at, lane;\n"
                    "ld.shared.b32 $0, [at];\n}",
                    "=r,r,n",
                    [window * (4 * COPIES), COPIES - 1],
                    tl.int32,
                    True,
                    1,
                )
            else:
                total += tl.load(table_ptr + window)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))


# ---- measuring


def measure_triton(way: Way, bare: bool, tables: int, copies: list[Rows], samples: int) -> dict[str, Any]:
    """A row of Triton's own loads from a table: its sum of all words must be that of the values.

    bare: entries are one value in int8.  tables: copies in shared memory; 0: none.
    """
    words = table(dtype_of(way.dtype).trellis, torch.int8, torch.device("cpu"))[0] if bare else entries(way)
    device_words = words.cuda()
    programs, r = 16 * MULTIPROCESSORS, 128
    count = ROWS // r // programs
    sums = torch.zeros(programs, dtype=torch.int32, device="cuda")

    def call(rows: Rows) -> None:
        gather_kernel[(programs,)](
            rows.codes.view(torch.int32), rows.scale, device_words, sums, count, way.takes, r, tables, num_warps=4
        )

    done = programs * count * r
    call(copies[0])
    want = 0
    for begin in range(0, done, 1 << 18):
        assert copies[0].scale is not None
        end = min(begin + (1 << 18), done)
        some = Rows(copies[0].codes[begin:end], copies[0].scale[begin:end])
        values = values_of(dtype_of(way.dtype), some)[:, order_of(way, torch.device("cuda"))]
        packed = values.view(-1, way.takes)
        if bare:
            want += int(values.sum())
        elif way.kind in (VALUES, PAIRS):
            bits = packed.to(torch.float16).view(torch.int16).to(torch.int64) & 0xFFFF
            want += int((bits << (16 * torch.arange(way.takes, device="cuda"))).sum())
        else:
            want += int(((packed.to(torch.int64) & 255) << (8 * torch.arange(4, device="cuda"))).sum())
    ok = int(sums.to(torch.int64).sum()) % 2**32 == want % 2**32
    row: dict[str, Any] = {"way": way.name, "dtype": way.dtype, "gate": "ok" if ok else "another sum"}
    if ok:
        times = time_calls([partial(call, rows) for rows in copies], samples)
        row.update(us=times.median * ROWS / done, samples_us=[x * ROWS / done for x in times.samples_us])
    return row


def measure(way: Way, programs: list[Future[bytes]], copies: list[Rows], samples: int) -> dict[str, Any]:
    """A row: gates first, then the time. programs: to be timed, and that writes its registers."""
    dtype = dtype_of(way.dtype)
    row: dict[str, Any] = {"way": way.name, **asdict(way), "gate": None}
    query = torch.randint(-LARGEST, LARGEST + 1, (HEADS, HEAD_DIM), generator=torch.Generator().manual_seed(0))
    reader = Reader(way, programs[0].result())
    warps = MULTIPROCESSORS * way.threads // 32
    sums = torch.zeros(warps, 8, 4, 2, 2, device="cuda")  # of row g: head 2 t + column, of rows g and g + 8
    mine = operand(way, query).cuda()
    if way.kind != MASKS:
        hard = hard_rows(dtype)
        if not check_values(Reader(way, programs[1].result()), hard, values_of(dtype, hard)):
            return row | {"gate": "other values"}
        reader(copies[0], mine, sums, sums)
        want, allowed = expected(dtype, copies[0], query.cuda())
        error = float((sums.double().sum((0, 1, 3)).flatten() - want).abs().max())
        row.update(error=error, allowed=allowed)
        if not error <= allowed:
            return row | {"gate": "another sum"}
    times = time_calls([partial(reader, rows, mine, sums, sums) for rows in copies], samples)
    row.update(us=times.median, us_p10=times.quantile(0.1), us_p90=times.quantile(0.9))
    row["gate"] = "ok" if way.kind != MASKS else "-"
    row["samples_us"] = list(times.samples_us)
    return row


@dataclass(frozen=True)
class Step:
    """What a decode step reads: keys and values in pages of 64 tokens, and a query a sequence."""

    query: Tensor  # [B, HQ, D] bf16
    keys: Rows  # [P * HKV * PAGE]
    values: Rows
    page_table: Tensor  # [B, pages] int32
    lengths: Tensor  # [B] int32

    @classmethod
    def make(cls, length: int, seed: int) -> Step:
        pages = -(-length // PAGE)
        made = torch.Generator("cuda").manual_seed(seed)
        order = torch.randperm(BATCH * pages, device="cuda", generator=made)
        tokens = BATCH * pages * KV_HEADS * PAGE
        # the last tile of a sequence may be a part of one
        less = torch.arange(BATCH, dtype=torch.int32, device="cuda") % (19 if length % PAGE else 1)
        return cls(
            torch.randn(BATCH, QUERY_HEADS, HEAD_DIM, device="cuda", generator=made).to(torch.bfloat16),
            random_rows(dtype_of("tcq2"), tokens, 2 * seed, -5),
            random_rows(dtype_of("tcq2"), tokens, 2 * seed + 1, -5),
            order.to(torch.int32).view(BATCH, pages),
            length - less,
        )

    def wanted(self, query: Tensor, b: int) -> Tensor:
        """[HQ, D] float64: attention of sequence b over its rows, of turned queries; its outputs are turned too."""
        dtype, length = dtype_of("tcq2"), int(self.lengths[b])
        page = self.page_table[b].to(torch.int64)
        sides = []
        for rows in (self.keys, self.values):
            assert rows.scale is not None
            codes = rows.codes.view(-1, KV_HEADS, PAGE, rows.codes.shape[-1])[page]
            scale = rows.scale.view(-1, KV_HEADS, PAGE)[page]
            x = trellis_kernels.dequantize(dtype, Rows(codes.flatten(0, 2), scale.flatten()), HEAD_DIM).double()
            sides.append(x.view(len(page), KV_HEADS, PAGE, HEAD_DIM).transpose(0, 1).flatten(1, 2)[:, :length])
        q = query[b].double().view(KV_HEADS, -1, HEAD_DIM)
        weights = (q @ sides[0].transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1)
        out: Tensor = (weights @ sides[1]).flatten(0, 1)
        return out


class Decoder(Reader):
    """Attention over trellises, built and loaded."""

    def __init__(self, way: Way, cubin: bytes) -> None:
        super().__init__(way, cubin, "decode_rows")
        self.turn = Turn(HEAD_DIM, 4, torch.ones(HEAD_DIM, device="cuda"))
        self.splits = MULTIPROCESSORS * way.threads // 32 // (BATCH * KV_HEADS)

    def attend(self, step: Step, query: Tensor, turn: Turn) -> Tensor:
        """[B, HQ, D] bf16 of queries as fp16, turned as the keys are; turned back by `turn`."""
        group, pairs = QUERY_HEADS // KV_HEADS, BATCH * KV_HEADS
        part_o = torch.empty(pairs, self.splits, group, HEAD_DIM, device="cuda")
        part_m, part_l = torch.empty(2, pairs, self.splits, group, device="cuda")
        rows = [step.keys.codes, step.keys.scale, step.values.codes, step.values.scale]
        arguments = [query, *rows, step.page_table, step.lengths, self.table, part_o, part_m, part_l]
        arguments += [pairs, self.splits, step.page_table.shape[1]]
        self.launch(arguments)
        out = torch.empty(
            BATCH, QUERY_HEADS, HEAD_DIM, dtype=torch.float32 if turn.block == 1 else torch.bfloat16, device="cuda"
        )
        merge(
            part_o,
            part_m,
            part_l,
            out,
            turn,
            kv_heads=KV_HEADS,
            group=group,
            sinks=None,
            v_scale=None,
            query_starts=None,
        )
        return out

    def step(self, step: Step) -> Tensor:
        """What is timed."""
        return self.attend(step, rotate(step.query, self.turn, dtype=torch.float16), self.turn)


def measure_decode(way: Way, built: Future[bytes], steps: list[Step], samples: int) -> dict[str, Any]:
    """A row: the gate, then the time of a step of 32 sequences of 8192 tokens."""
    row: dict[str, Any] = {"way": way.name, **asdict(way), "gate": None}
    decoder = Decoder(way, built.result())
    errors = []
    for step in (Step.make(1000, 7), steps[0]):
        query = rotate(step.query, decoder.turn, dtype=torch.float16)
        got = decoder.attend(step, query, Turn()).double()
        for b in (0, 1, BATCH - 1):
            want = step.wanted(query, b)
            errors.append(float((got[b] - want).norm() / want.norm()))
    row["error"] = max(errors)
    # weights are fp16, of 11 bits, and all else is finer; each by itself, for no maximum tells of a NaN
    if not all(error <= 2.0**-11 for error in errors):
        return row | {"gate": "other outputs"}
    times = time_calls([partial(decoder.step, step) for step in steps], samples)
    row.update(us=times.median, us_p10=times.quantile(0.1), us_p90=times.quantile(0.9), gate="ok")
    row["samples_us"] = list(times.samples_us)
    alone = time_calls(
        [
            partial(decoder.attend, step, rotate(step.query, decoder.turn, dtype=torch.float16), decoder.turn)
            for step in steps
        ],
        samples,
    )
    return row | {"us_without_turning_queries": alone.median}


def main() -> None:
    """Measures, prints and keeps what was found, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="gets the rows beside those that are there")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--part", action="append", choices=PARTS, help="of these alone; a fault ends a process")
    given = parser.parse_args()
    parts = given.part or PARTS
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("not run: there is no GPU of compute capability 9.0 here to time on")
        return
    found: dict[str, Any] = {"rows": [], "peers": []}
    if given.out and given.out.exists():
        found = json.loads(given.out.read_text())
    found["environment"] = describe()

    def keep_file() -> None:
        if given.out:
            given.out.write_text(json.dumps(found, indent=1))

    def keep(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        show(row)
        keep_file()

    def attempt(way: Way, measured: Callable[[], dict[str, Any]]) -> None:
        try:
            row = measured()
        except Exception:
            row = {"way": way.name, "dtype": way.dtype, "gate": traceback.format_exc(limit=3)}
        keep(row | {"predicted": way.predicted(COPY_SHARE * found["copy_gbps"])})

    with ThreadPoolExecutor() as pool:
        built = {(way, dump): pool.submit(build, way, dump) for way in WAYS + MORE for dump in (False, True)}
        steps_built = {way: pool.submit(build, way, decode=True) for way in DECODES}
        torch.cuda.init()
        found["copy_gbps"] = copy_bandwidth()

    @lru_cache
    def copies(name: str) -> list[Rows]:
        count = max(2, cold_copies(nbytes(int(name[-1]))))
        made = [random_rows(dtype_of(name), ROWS, seed) for seed in range(count)]
        target = torch.empty_like(made[0].codes)
        times = time_calls([partial(target.copy_, rows.codes) for rows in made], given.samples)
        keep({"way": "a copy of the codes", "dtype": name, "gate": "-", "us": times.median})
        return made

    for way in (WAYS if "read" in parts else ()) + (MORE if "more" in parts else ()):
        programs = [built[way, False], built[way, True]]
        attempt(way, partial(measure, way, programs, copies(way.dtype), given.samples))
    if "decode" in parts:
        steps = [Step.make(CONTEXT, seed) for seed in range(max(2, cold_copies(nbytes(2))))]
        for way in DECODES:
            attempt(way, partial(measure_decode, way, steps_built[way], steps, given.samples))
    if "peers" in parts:
        found["peers"] = run(PEER, lambda row: print(row["dtype"], row["us"], row["gate"], flush=True)).rows
        keep_file()
    if "triton" in parts:
        for kind, bare, tables in (
            (VALUES, False, 32),
            (PAIRS, False, 8),
            (VALUES, True, 0),
            (VALUES, False, 0),
            (PAIRS, False, 0),
            (QUADS, False, 0),
        ):
            where = f"{tables} tables" if tables else f"L1{bare * ', one byte'}"
            way = Way(f"Triton, {TAKES[kind]} a lookup, {where}", "tcq2", kind, 0, 0, max(1, tables), not tables)
            attempt(way, partial(measure_triton, way, bare, tables, copies(way.dtype), given.samples))


def show(row: dict[str, Any]) -> None:
    predicted = row.get("predicted") or {}
    by = max(predicted, key=predicted.get) if predicted else None  # type: ignore[arg-type]
    us = "-" if row.get("us") is None else f"{row['us']:.1f}"
    expected_us = f"{predicted[by]:.0f} ({by})" if by else "-"
    print(f"{row['dtype']:6}{row['way']:40}{us:>8} µs, predicted {expected_us:18} {row['gate']}", flush=True)


if __name__ == "__main__":
    main()
