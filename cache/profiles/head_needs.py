"""Which losses a head of single entries serves, by what is taken for the tail outside it (docs/methods.md)."""

from collections.abc import Iterator

from tristill.cache.profiles.profile import Need, TailTreatment

MINING = "mining by divergence"
"""What picking positions by their forward KL is called."""
_OF_ENTRIES_ALONE = {"logit_mse", "ranking", "top1_hinge"}
"""Losses that look at single entries alone, and at no tail."""


def unserved_by_head(
    need: Need, profile: str, declared: tuple[float, ...], own: TailTreatment, about: str
) -> str | None:
    """Why a loss cannot have what it needs from a head; None when it can.

    `declared`: temperatures at which the tail's mass is known; none if it is not. `own`: the treatment that the
    profile takes if the loss names none. `about`: the size of the head, for messages.
    """
    return next(_reasons(need, need.tail or own, profile, declared, about), None)


def _reasons(
    need: Need, treatment: TailTreatment, profile: str, declared: tuple[float, ...], about: str
) -> Iterator[str]:
    if treatment == "sampled":
        yield f"tail 'sampled' is asked for, but this {profile} cache holds no draws; use profile sampled"
    if need.divergence == "decoupled_kd of labels" and treatment != "uniform":
        yield (
            f"decoupled_kd of labels is asked for, but this {profile} cache does not know the probability of labels "
            "outside its head; set of = 'top1', or use a cache with profile transform without distill.tail"
        )
    if need.divergence in _OF_ENTRIES_ALONE and treatment != "uniform":
        return
    if treatment in {"renormalise", "zero"}:
        yield from _reasons_without_tail(need, treatment, profile)
        if treatment == "renormalise":
            return
    if not declared:
        yield (
            f"tail {treatment!r} is asked for, but this {profile} cache has not kept its tail's mass; dump with "
            "cache.profile.tail = 'bucket'"
        )
    if need.until is not None or need.temperature not in declared:
        yield (
            f"{need.temperatures} is asked for, but this {profile} cache is exact at "
            f"{', '.join(f'{temperature:g}' for temperature in declared)} only: the mass outside {about} was summed at "
            "those; add it to cache.profile.temperatures, or use profile transform"
        )


def _reasons_without_tail(need: Need, treatment: TailTreatment, profile: str) -> Iterator[str]:
    if need.highest > 1:
        yield (
            f"{need.temperatures} is asked for, but with tail {treatment!r} this {profile} cache knows nothing of its "
            "tail: a renormalised head above temperature 1 teaches a distribution that the teacher does not have, and "
            "ruins students; use temperature 1, or a cache with profile transform"
        )
    if treatment == "zero" and need.divergence not in {"forward_kl", MINING}:
        yield (
            f"{need.divergence} is asked for with tail 'zero', whose probabilities sum to less than one: that is a "
            "weight of the position for forward_kl, and no distribution for other losses; use tail 'bucket'"
        )
    if treatment == "renormalise" and need.divergence in {"reverse_kl", "adaptive_kl"}:
        yield (
            f"{need.divergence} is asked for with tail 'renormalise', which takes p = 0 outside the head, where "
            "log(q / p) is infinite; use tail 'bucket', or skew_reverse_kl"
        )


def whole_distribution(tail: TailTreatment, who: str) -> str:
    """Why a treatment of the tail is refused where no id lies outside what is known."""
    return (
        f"tail {tail!r} is asked for, but {who} knows the whole distribution and keeps no head; leave distill.tail "
        "out, or use a cache with profile transform or topk"
    )
