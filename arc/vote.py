"""Which of many answers to submit: candidates ranked, each with the samples that speak for it."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from arc.ask import Asking, Sample
from arc.augment import IDENTITY, Augmentation
from arc.errors import InputError
from arc.grid import Grid, size_of
from arc.prompt import answer
from arc.task import Task

Score = Callable[[str, list[str]], Sequence[float]]
"""`score(prompt, completions)`: the log-probability of each completion after the prompt."""


@dataclass(frozen=True)
class Candidate:
    """A grid somebody answered; `votes` and `mean_log_prob` rank it, unless a `score` was asked for."""

    grid: Grid
    votes: int
    mean_log_prob: float
    """Mean over its samples of the completion's summed log-probability."""
    samples: tuple[Sample, ...]
    score: float | None = None
    """Sum over augmentations of the log-probability of this grid as the answer."""

    def __repr__(self) -> str:
        log_prob = f"mean_log_prob {self.mean_log_prob:.4g}, score {self.score}"
        return f"Candidate({size_of(self.grid)}, votes {self.votes} of {len(self.samples)} samples, {log_prob})"


def _key(grid: Grid) -> tuple[tuple[int, ...], bytes]:
    return grid.shape, grid.tobytes()


def _candidate(samples: Sequence[Sample], votes: int | None = None) -> Candidate:
    grid = samples[0].grid
    assert grid is not None  # only parsed samples reach a ballot
    mean = sum(sample.completion.log_prob for sample in samples) / len(samples)
    return Candidate(grid, len(samples) if votes is None else votes, mean, tuple(samples))


def _ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    # the grid itself is the last word, so that the order of samples never decides
    return sorted(candidates, key=lambda c: (-c.votes, -c.mean_log_prob, _key(c.grid)))


def _grouped(samples: Iterable[Sample]) -> list[list[Sample]]:
    groups: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        if sample.grid is not None:
            groups.setdefault(_key(sample.grid), []).append(sample)
    return list(groups.values())


def by_count(samples: Iterable[Sample]) -> list[Candidate]:
    """The most frequent grid first; among equals the one with the higher mean log-probability."""
    return _ranked(map(_candidate, _grouped(samples)))


def symmetry_class(sample: Sample) -> Hashable:
    return sample.augmentation.symmetry


def by_class(
    samples: Iterable[Sample], *, classify: Callable[[Sample], Hashable] = symmetry_class, keep: int = 3
) -> list[Candidate]:
    """Two levels (Akyürek et al. 2024, sec. 4): each augmentation class sends its `keep` best, the classes then vote.

    A candidate's votes are the classes that sent it; grids that no class sent follow, ranked by count, with no votes.
    """
    samples = list(samples)
    classes: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        classes.setdefault(classify(sample), []).append(sample)
    sent: dict[Hashable, int] = {}
    for members in classes.values():
        for candidate in by_count(members)[:keep]:
            sent[_key(candidate.grid)] = sent.get(_key(candidate.grid), 0) + 1
    counted = [replace(c, votes=sent.get(_key(c.grid), 0)) for c in by_count(samples)]
    # among candidates of as many classes, the more frequent one
    return sorted(counted, key=lambda c: (-c.votes, -len(c.samples), -c.mean_log_prob, _key(c.grid)))


def by_log_prob(samples: Iterable[Sample]) -> list[Candidate]:
    """The grid with the single most probable completion first: what a search over probabilities wants."""
    best = lambda c: max(sample.completion.log_prob for sample in c.samples)  # noqa: E731
    return sorted(by_count(samples), key=lambda c: (-best(c), -c.votes, _key(c.grid)))


SELECT: dict[str, Callable[[Iterable[Sample]], list[Candidate]]] = {
    "count": by_count,
    "class": by_class,
    "log_prob": by_log_prob,
}


def rescore(
    candidates: Sequence[Candidate],
    task: Task,
    test: int,
    score: Score,
    augmentations: Sequence[Augmentation] = (IDENTITY,),
    asking: Asking | None = None,
) -> list[Candidate]:
    """Candidates by the sum of their log-probabilities as the answer under each augmentation.

    A false answer that looks likely from one side seldom does from all (Franzen et al. 2025, product of experts).
    """
    how = asking or Asking()
    totals = [0.0] * len(candidates)
    for augmentation in augmentations if candidates else ():
        prompt = how.prompt(augmentation.apply(task), test)
        answers = [answer(augmentation.apply_grid(c.grid), how.encoder, how.format) for c in candidates]
        # what the prompt already says of the answer is not scored again
        log_probs = score(prompt.text, [text.removeprefix(prompt.begun) for text in answers])
        if len(log_probs) != len(answers) or any(value != value for value in log_probs):
            raise InputError(f"score: found {list(log_probs)[:8]}, expected {len(answers)} log-probabilities")
        totals = [total + float(value) for total, value in zip(totals, log_probs, strict=True)]
    scored = [replace(c, score=total) for c, total in zip(candidates, totals, strict=True)]
    return sorted(scored, key=lambda c: (-(c.score or 0.0), -c.votes, _key(c.grid)))
