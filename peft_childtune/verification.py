"""Verification: whether what has arrived is what was sealed, and the base the one it was made for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from .errors import BaseMismatchError, DeltaError, FormatError, IntegrityError
from .seal import Seal, Sealed, child_digest, head_fingerprint, name_hash, read_seal
from .weights import check_finite, matches

__all__ = ["THE_NAMED_BASE", "base_mismatch", "report", "skip_verification", "verify_seal", "verify_stored"]

logger = logging.getLogger(__name__)

THE_NAMED_BASE = "the base model (and revision) named in its adapter_config.json"

_skipping = ContextVar("_skipping", default=False)


def _names(what: str, sealed: Collection[bytes], found: Mapping[str, object]) -> Iterator[Exception]:
    hashes = {name_hash(name): name for name in found}
    for key, name in hashes.items():
        if key not in sealed:
            yield IntegrityError(
                f"{name}: the adapter was saved without this {what}; its configuration and its weights file do not "
                "belong together, or the base model has other modules than the one it was made for."
            )
    if absent := set(sealed) - set(hashes):
        yield IntegrityError(
            f"{len(absent)} of the {len(sealed)} {what}s that were saved are not in this model; the base model is "
            f"another one, or `target_modules` differs. Present, for example: {next(iter(found), 'none')}."
        )


def _stored_problems(
    saved: Seal,
    children: Mapping[str, Sealed],
    heads: Mapping[str, Tensor],
    config: bytes | None,
    unverified: list[str],
) -> Iterator[Exception]:
    """Yield an error for each stored thing that is not as the seal has it, and append what it cannot tell."""
    if config is not None and config != saved.config:
        yield IntegrityError(
            "adapter_config.json: its fields are not those with which the weights file was saved; one of the two is "
            "damaged, or they do not belong together: fetch both again. To change a field, change it after loading."
        )
    yield from _names("base tensor", saved.children, children)
    yield from _names("`modules_to_save` tensor", saved.heads, heads)
    sealed = {name: saved.children[key] for name in children if (key := name_hash(name)) in saved.children}
    for name, (digest, _) in sealed.items():
        if child_digest(name, children[name]) != digest:
            yield IntegrityError(
                f"{name}: the stored child differs from what was saved; the file is damaged, fetch it again."
            )
            continue
        try:
            check_finite(name, children[name].values)
        except DeltaError as error:
            yield error
    for name, tensor in heads.items():
        if (fingerprint := saved.heads.get(name_hash(name))) is None:
            continue
        if (same := matches(fingerprint, head_fingerprint(tensor))) is False:
            yield IntegrityError(
                f"{name}: the stored tensor differs from what was saved; the file is damaged, fetch it again."
            )
        elif same is None:
            unverified.append(name)


def _problems(
    saved: Seal,
    children: Mapping[str, Sealed],
    heads: Mapping[str, Tensor],
    config: bytes | None,
    made_for: str,
    unverified: list[str],
) -> Iterator[Exception]:
    """Yield an error for each thing, stored or of the base, that is not as the seal has it, and warn likewise."""
    yield from _stored_problems(saved, children, heads, config, unverified)
    rounded: list[str] = []
    for name in children:
        if (key := name_hash(name)) not in saved.children:
            continue
        (_, then), now = saved.children[key], children[name].fingerprint()
        if (same := matches(then, now)) is False:
            yield base_mismatch(name, made_for)
        elif same is None:
            unverified.append(name)
        elif then.dtype != now.dtype:
            rounded.append(name)
    if rounded:
        logger.warning(
            "%s and %d more tensors of the base have another precision than when the adapter was saved: they are the "
            "same within its rounding.",
            rounded[0],
            len(rounded) - 1,
        )
    if unverified:
        logger.warning(
            "%s and %d more tensors could not be verified: the adapter was made on a bfloat16 base and this one is "
            "float16, or the other way round. Load the base in the precision in which it was published to have it "
            "checked.",
            unverified[0],
            len(unverified) - 1,
        )


def base_mismatch(name: str, made_for: str) -> BaseMismatchError:
    """Return the error for a base tensor that is not the one an adapter was made for."""
    return BaseMismatchError(
        f"{name}: the base weights differ from those that the adapter was made for; load it onto {made_for}."
    )


def verify_stored(
    seal: Tensor, children: Mapping[str, Sealed], heads: Mapping[str, Tensor], *, config: bytes | None = None
) -> list[str]:
    """Check that everything stored is what was saved; nothing is asked of the base.

    Args:
        seal: as made by `make_seal`, like the others.
        children: see `seal`; no fingerprint is called for.
        heads: see `seal`.
        config: the digest of the configuration's own fields; None where the configuration came from no file.

    Returns:
        The heads of which nothing can be said, as they came in another half precision.

    Raises:
        FormatError: the seal itself is malformed.
        IntegrityError: a tensor or the configuration was changed since, or a tensor is missing or one too many.
        DeltaError: a delta is not finite.
    """
    unverified: list[str] = []
    for problem in _stored_problems(read_seal(seal), children, heads, config, unverified):
        raise problem
    return unverified


def verify_seal(
    seal: Tensor,
    children: Mapping[str, Sealed],
    heads: Mapping[str, Tensor],
    *,
    config: bytes | None = None,
    made_for: str = THE_NAMED_BASE,
) -> list[str]:
    """Check that everything is what was saved and that the base is the one it was made for.

    Args:
        seal: as made by `make_seal`.
        children: every covered base tensor of the model, with what the file holds for it.
        heads: every `modules_to_save` tensor, as the file holds it.
        config: the digest of the configuration's own fields; None where the configuration came from no file.
        made_for: what the configuration says of the base, for errors.

    Returns:
        The tensors of which nothing can be said, bfloat16 here and float16 there; they are warned of as well.

    Raises:
        FormatError: the seal itself is malformed.
        IntegrityError: a tensor or the configuration was changed since, or a tensor is missing or one too many.
        DeltaError: a delta is not finite.
        BaseMismatchError: a base tensor differs from the one that the adapter was made for.
    """
    try:
        saved = read_seal(seal)
    except FormatError as error:
        report(error)
        return []
    unverified: list[str] = []
    for problem in _problems(saved, children, heads, config, made_for, unverified):
        report(problem)
    return unverified


def report(problem: Exception) -> None:
    """Raise a problem, or, within `skip_verification`, warn of it."""
    if not _skipping.get():
        raise problem
    logger.warning("not verified: %s", problem)


@contextmanager
def skip_verification() -> Iterator[None]:
    """Load adapters within this block though they are not what was saved, or not for this base, and warn of each.

    What a code must fulfil to be decoded is checked nevertheless: the model may be wrong, the process stays safe.
    Other threads, and adapters that are verified later, at their first use, are not concerned.

    Example:
        >>> with skip_verification():
        ...     pass  # PeftModel.from_pretrained(other_base, "my_child")
    """
    logger.warning("skip_verification: adapters are loaded here even if they are damaged or made for another base.")
    token = _skipping.set(True)
    try:
        yield
    finally:
        _skipping.reset(token)
