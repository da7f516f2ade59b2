"""Parts: what each of its instances did for a request, of the counts of all of them together. Knows no time."""

from msgspec.structs import replace

from memserve.request_stats import RequestStats, Stint


def instances_of(stats: RequestStats) -> list[str]:
    """The labels of all that had a part in it, in order."""
    named = (stats.instance, *(stint.instance for stint in stats.stints), stats.decode_instance)
    return list(dict.fromkeys(label for label in named if label))


def part_of(instance: str, stats: RequestStats) -> RequestStats:
    """What one of them did: all of it, or the prompt and what it generated then, or a part of what came after that."""
    first, *others = parts = _stints(stats)
    if instance == first.instance:
        preemptions = stats.num_preemptions - stats.num_preemptions_on_decode
        return replace(stats, num_generated=first.num_generated, num_preemptions=preemptions, num_computed_on_decode=0)
    (part,) = [stint for stint in others if stint.instance == instance]
    assert sum(stint.num_generated for stint in parts) == stats.num_generated
    return replace(
        stats,
        num_prompt=0,
        num_cached_local=0,
        num_fetched=0,
        num_computed=0,
        num_computed_on_decode=part.num_computed,
        num_generated=part.num_generated,
        num_preemptions=part.num_preemptions,
    )


def _stints(stats: RequestStats) -> list[Stint]:
    """Of its instances in order, of which the first has its prefill apart, and the last what the others leave."""
    own = [stint for stint in stats.stints if stint.instance == stats.instance]
    later = [stint for stint in stats.stints if stint.instance != stats.instance]
    if stats.decode_instance in ("", stats.instance):
        return [Stint(stats.instance, stats.num_generated, 0, 0)]
    first = own[0] if own else Stint(stats.instance, 1, 0, 0)  # a prefill instance generates one token
    if later and later[-1].instance == stats.decode_instance:  # it was given up before anybody went on with it
        return [first, *later]
    last = Stint(
        stats.decode_instance,
        stats.num_generated - first.num_generated - sum(stint.num_generated for stint in later),
        stats.num_computed_on_decode - sum(stint.num_computed for stint in later),
        stats.num_preemptions_on_decode - sum(stint.num_preemptions for stint in later),
    )
    return [first, *later, last]
