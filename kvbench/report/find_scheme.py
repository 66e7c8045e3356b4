"""Which scheme `--baseline` means. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection

from kvbench.registry import find_name


def find_scheme(
    schemes: Collection[tuple[str, str]], name: str, usual: tuple[str, str] | None = None
) -> tuple[str, str]:
    """The one of `schemes` that DTYPE or DTYPE/ROTATION means; each name may be short where it is unique.

    usual: what DTYPE alone means where it has several rotations, else the one without.

    Raises:
        ValueError: none or several; the message lists what there is.
    """
    dtype, slash, rotation = name.partition("/")
    try:
        wanted = _whole(dtype, [one[0] for one in schemes], "dtype")
        turned = _whole(rotation, [one[1] for one in schemes], "rotation") if slash else None
    except ValueError as error:
        fitting, why = [], str(error)
    else:
        fitting = [one for one in schemes if one[0] == wanted and turned in (None, one[1])]
        fitting = [one for one in (usual, (wanted, "none")) if one in fitting][:1] or fitting
        why = "several schemes" if fitting else "no such scheme was measured"
    if len(fitting) != 1:
        there = ", ".join("/".join(one) for one in fitting or schemes)
        raise ValueError(f"--baseline {name}: {why}; DTYPE/ROTATION is one of {there}")
    return fitting[0]


def _whole(text: str, names: Collection[str], what: str) -> str:
    """The one of `names`, some of which are KEY:VALUE, that `text` is or begins."""
    halves = {half for name in names for half in name.split(":")}
    return ":".join(dict.fromkeys(find_name(part, halves, what) for part in text.split(":")))
