"""Which scheme `--baseline` means. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection

from kvbench.registry import find_name

Scheme = tuple[str, str]  # dtype and rotation, as tables have them


def find_scheme(schemes: Collection[Scheme], name: str, meant: Callable[[str], Scheme | None]) -> Scheme:
    """The one of `schemes` that DTYPE, DTYPE/ROTATION or a preset's name means, as in a YAML.

    Of what a YAML does not take, or means otherwise, a name may be short where it is unique, and a dtype that was
    measured under one rotation alone means that.
    meant: what a YAML takes the name for, None where it does not; not asked where both names are given in full.

    Raises:
        ValueError: none or several; the message lists what there is.
    """
    dtype, slash, rotation = name.partition("/")
    if (dtype, rotation) in schemes:
        return dtype, rotation
    own = meant(name)
    if own in schemes:
        assert own is not None
        return own
    try:
        wanted = _whole(dtype, [one[0] for one in schemes], "dtype")
        turned = _whole(rotation, [one[1] for one in schemes], "rotation") if slash else None
    except ValueError as error:
        fitting, why = [], str(error)
    else:
        fitting = [one for one in schemes if one[0] == wanted and turned in (None, one[1])]
        why = "several schemes" if fitting else "no such scheme was measured"
    if len(fitting) == 1 and (own is None or own[0] == fitting[0][0]):
        return fitting[0]
    there = ", ".join("/".join(one) for one in fitting or schemes)
    if own and fitting:
        why = f"it means {'/'.join(own)}, which was not measured"
    raise ValueError(f"--baseline {name}: {why}; DTYPE/ROTATION is one of {there}")


def _whole(text: str, names: Collection[str], what: str) -> str:
    """The one of `names`, some of which are KEY:VALUE, that `text` is or begins."""
    halves = {half for name in names for half in name.split(":")}
    return ":".join(dict.fromkeys(find_name(part, halves, what) for part in text.split(":")))
