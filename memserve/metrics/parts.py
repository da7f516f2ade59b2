"""Parts: what each of its instances did for a request, of the counts of all of them together. Knows no time."""

from msgspec.structs import replace

from memserve.request_stats import RequestStats, Stint


def instances_of(stats: RequestStats) -> list[str]:
    """The labels of all that had a part in it, in order."""
    named = (stats.instance, *(stint.instance for stint in stats.stints), stats.decode_instance)
    return list(dict.fromkeys(label for label in named if label))


def part_of(instance: str, stats: RequestStats) -> RequestStats:
    """What one of them did: all of it, or the prompt and what it generated then, or parts of what came after that.

    An answer may have come back to an instance that it had left.
    """
    first, *others = parts = _stints(stats)
    assert sum(stint.num_generated for stint in parts) == stats.num_generated
    own = [stint for stint in others if stint.instance == instance]
    later = Stint(
        instance,
        sum(stint.num_generated for stint in own),
        sum(stint.num_computed for stint in own),
        sum(stint.num_preemptions for stint in own),
    )
    if instance == first.instance:
        before = stats.num_preemptions - stats.num_preemptions_on_decode
        return replace(
            stats,
            num_generated=first.num_generated + later.num_generated,
            num_preemptions=before + later.num_preemptions,
            num_computed_on_decode=later.num_computed,
        )
    return replace(
        stats,
        num_prompt=0,
        num_cached_local=0,
        num_fetched=0,
        num_computed=0,
        num_computed_on_decode=later.num_computed,
        num_generated=later.num_generated,
        num_preemptions=later.num_preemptions,
    )


def _stints(stats: RequestStats) -> list[Stint]:
    """Of its instances in order, of which the first has its prefill apart, and the last what the others leave."""
    parts = list(stats.stints)
    if not stats.decode_instance:  # nobody else went on with it
        return parts or [Stint(stats.instance, stats.num_generated, 0, 0)]
    if not parts or parts[0].instance != stats.instance:
        parts.insert(0, Stint(stats.instance, 1, 0, 0))  # a prefill instance generates one token
    if len(parts) > 1 and parts[-1].instance == stats.decode_instance:  # it was given up before anybody went on with it
        return parts
    later = parts[1:]
    last = Stint(
        stats.decode_instance,
        stats.num_generated - sum(stint.num_generated for stint in parts),
        stats.num_computed_on_decode - sum(stint.num_computed for stint in later),
        stats.num_preemptions_on_decode - sum(stint.num_preemptions for stint in later),
    )
    return [*parts, last]
