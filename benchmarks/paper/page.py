"""The page of results: the paper's results beside the simulation's, and every row beside its bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from benchmarks.paper.cases import Experiment
from benchmarks.paper.hardware import Profile
from benchmarks.paper.summary import Estimate, Line
from benchmarks.paper.targets import Target, targets

_OURS = ("tokenflow", "full")

_INTRO = """\
# The paper's experiments, simulated

Written by `python -m benchmarks.paper`; do not edit. **Everything on this page is simulated**: the engine's own \
EngineCore, Scheduler and KVCacheManager ran in virtual time on hardware models whose numbers were never measured. \
Compare ratios with the paper, not seconds; until a profile is fitted from a measured run, the seconds are \
predictions.

- The device's KV was capped by the memory fraction that the paper states, so that bursts do not fit; tokenflow, the \
baselines that share time are told the readers' rates (and andes an expected TTFT), the fcfs family ignores them.
- tokenflow runs with `overload: queue`, and with `share` where it says so: a new request beyond the capacity waits, \
or all requests get less.
- No policy knows the length of an answer. max_tokens is the exact length unless a row says otherwise, which helps the \
policies that use it: fcfs reserves it, and tokenflow expects the lesser of max_tokens and the average of answers that \
ended by themselves, of which there are none then.
- fcfs is SGLang's scheduler: prefill first, a candidate charged its whole max_tokens (at most 4,096), running \
requests 0.7 of what remains, decaying over 600 steps to 0.098, retraction by fewest output tokens. Its batch is as \
large as the roofline's capacity assumes where memory lets it, see raw beside capacity.
- Effective throughput can be gamed; read it with raw, stalls and on-time goodput (tokens before their playback \
deadline, the clock starting 1.3 s after arrival). `fluid` is a constant capacity shared in proportion to rates; `own` \
is what the run's own tokens would have been worth, had each gone to the emptiest buffer. Neither knows about memory; \
a policy that lets a few run far ahead and keeps the others near empty can beat both. A constant capacity is kinder \
than a device, which generates fastest while contexts are short (in a burst, more than readers can use) and then slows \
down.
- Rows with recorded arrivals use the public BurstGPT and Azure traces that come with tfserve, at the speed that their \
titles say; they are not the windows that the paper used.
- Means over seeds, half-widths of 95 % intervals where given; ratios are paired by seed.
"""

_REASONS = """
- A constant capacity a little above demand would keep every buffer under a tenth of its answer. A device has no such \
capacity: while contexts are short it generates more than is read, so buffers exceed a fifth of the answer and further \
tokens count for nothing. tokenflow gives them to the requests that are far ahead, so that these finish; that helps \
only if not all fit on the device. With `generate_ahead_s` it idles instead, and that time is missing at the end, when \
only the longest answers are still read. `own` takes the run's tokens as they came and judges the order alone.
- The prefill bound has no decodes: on a busy device a new request first waits for the end of the running step, and \
then shares its own step with decodes. That is little compared with a burst's prefill, but most of a single prompt's.
"""

_HEAD = (
    "| case (seeds) | effective | x fcfs (most) | of fluid | of own | raw (x fcfs) | on time | TTFT mean (x fcfs) "
    "| P50 | P99 (x fcfs) | x prefill bound | TBT P99 | stall share | preemptions | GB out, in |"
)


def page(
    experiments: Sequence[Experiment], lines: Sequence[Line], plots: dict[str, list[str]], *, is_quick: bool
) -> str:
    """The Markdown page; `plots` are file names, relative to the page, by experiment."""
    parts = [_INTRO]
    if is_quick:
        parts.append("This is a `--quick` run: one seed and a few experiments.\n")
    parts += [_profiles(experiments), _beside_paper(experiments, lines), _targets(targets(lines))]
    for section, group in groupby(experiments, key=lambda experiment: experiment.section):
        parts.append(f"## {section}\n")
        parts += [_experiment(experiment, lines, plots.get(experiment.key, [])) for experiment in group]
    return "\n".join(parts)


def _profiles(experiments: Sequence[Experiment]) -> str:
    profiles: dict[str, Profile] = {}
    for experiment in experiments:
        for case in experiment.cases:
            profiles.setdefault(case.profile.name, case.profile)
    rows = [
        "| profile | memory, fraction | KV tokens on device | host KV, GB | peak TFLOP/s x share | GB/s x share "
        "| link GB/s each way | step + row overhead | batch, step tokens, page |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, profile in profiles.items():
        gpu = profile.gpu
        rows.append(
            f"| {name} | {gpu.memory_bytes / 1e9:.1f} GB, {profile.memory_fraction:g} | {profile.kv_tokens:,} "
            f"| {profile.host_kv_bytes / 1e9:g} | {gpu.flops / 1e12:g} x {gpu.compute_share:g} "
            f"| {gpu.memory_bytes_per_s / 1e9:g} x {gpu.memory_share:g} | {gpu.link_bytes_per_s / 1e9:g} "
            f"| {gpu.step_s * 1e3:g} ms + {gpu.row_s * 1e6:g} us | {profile.max_num_seqs}, "
            f"{profile.max_num_batched_tokens}, {profile.block_size} |"
        )
    note = (
        "\nstep time = max(compute, memory) + overhead; both directions of the link are queues of their own, 10 us a "
        "copy, 1.15 times as slow while the other direction is busy. The overhead is about what the Python loop of "
        "this engine costs at these batches.\n"
    )
    return "\n".join(["## Profiles\n", *rows, note])


def _beside_paper(experiments: Sequence[Experiment], lines: Sequence[Line]) -> str:
    rows = ["| experiment | the paper | here, tokenflow against fcfs |", "|---|---|---|"]
    for experiment in experiments:
        found = [line for line in lines if line.experiment == experiment.key and line.ratios]
        ours = [line for line in found if line.case in _OURS]
        if ours:
            rows.append(f"| {experiment.title} | {experiment.claim} | {_changes(ours[0])} |")
    return "\n".join(["## Beside the paper\n", *rows, ""])


def _changes(line: Line) -> str:
    named = (
        ("P99 TTFT", "ttft_p99_s"),
        ("mean TTFT", "ttft_mean_s"),
        ("effective", "effective"),
        ("on time", "on_time"),
        ("raw", "raw"),
    )
    changes = [f"{name} {_percent(line.ratio(metric))}" for name, metric in named]
    return f"{', '.join(changes)}; stall share {line.mean('stall_share'):.1%}"


def _targets(found: Iterable[Target]) -> str:
    rows = ["| target | met | where not |", "|---|---|---|"]
    rows += [f"| {target.text} | {target.verdict} | {'; '.join(target.misses) or '-'} |" for target in found]
    return "\n".join(["## Targets\n", *rows, _REASONS])


def _experiment(experiment: Experiment, lines: Sequence[Line], plots: Sequence[str]) -> str:
    mine = [line for line in lines if line.experiment == experiment.key]
    parts = [f"### {experiment.title}\n", f"Paper: {experiment.claim}. {_bounds(mine)}\n"]
    columns = _HEAD.count("|") - 1
    parts += [_HEAD, "|" + "---|" * columns, *(_row(line) for line in mine), ""]
    if any(line.classes for line in mine):
        parts += [_classes(mine), ""]
    parts += [f"![{experiment.key}]({name})\n" for name in plots]
    return "\n".join(parts)


def _bounds(lines: Sequence[Line]) -> str:
    bounds = lines[0].bounds
    if any(line.bounds != bounds for line in lines):
        return "The bounds differ from case to case."
    relation = "within" if lines[0].is_feasible else "above"
    return (
        f"Capacity {bounds['capacity']:.0f} tokens/s, peak demand {bounds['demand']:.0f} ({relation}); fluid "
        f"{bounds['fluid']:.0f}; P99 TTFT at least {bounds['ttft_p99_s']:.2f} s."
    )


def _row(line: Line) -> str:
    metrics, bounds = line.metrics, line.bounds
    most = f" ({line.effective_bound:.2f})" if line.effective_bound is not None else ""
    cells = [
        f"{line.case} ({line.seeds})",
        _spread(metrics["effective"], 0),
        f"{_times(line.ratio('effective'))}{most}",
        f"{line.mean('effective') / bounds['fluid']:.2f}",
        f"{line.mean('effective') / line.mean('fluid_own'):.2f}",
        f"{_spread(metrics['raw'], 0)} ({_times(line.ratio('raw'))})",
        f"{line.mean('on_time'):.0f}",
        f"{_spread(metrics['ttft_mean_s'], 2)} ({_times(line.ratio('ttft_mean_s'))})",
        f"{line.mean('ttft_p50_s'):.2f}",
        f"{_spread(metrics['ttft_p99_s'], 2)} ({_times(line.ratio('ttft_p99_s'), 3)})",
        f"{line.mean('ttft_p99_s') / bounds['ttft_p99_s']:.2f}",
        f"{line.mean('tbt_p99_s'):.3f}",
        f"{line.mean('stall_share'):.3f}",
        f"{line.mean('preemptions'):.2f}",
        f"{line.mean('stored_gb'):.0f}, {line.mean('loaded_gb'):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _classes(lines: Sequence[Line]) -> str:
    rows = ["| case | readers of | got tokens/s | stall share | effective share |", "|---|---|---|---|---|"]
    for line in lines:
        for group in line.classes:
            rows.append(
                f"| {line.case} | {group.rate:g}/s ({group.num_requests}) | {group.read_per_s:.2f} "
                f"| {group.stall_share:.3f} | {group.effective_share:.2f} |"
            )
    return "\n".join(rows)


def _spread(estimate: Estimate, digits: int) -> str:
    text = f"{estimate.mean:.{digits}f}"
    return text if math.isnan(estimate.half) else f"{text} ± {estimate.half:.{digits}f}"


def _times(ratio: float | None, digits: int = 2) -> str:
    return "-" if ratio is None else f"{ratio:.{digits}f}"


def _percent(ratio: float | None) -> str:
    return "n/a" if ratio is None else f"{100 * (ratio - 1):+.1f} %"
