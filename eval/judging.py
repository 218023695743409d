"""Letting a detector look at stored pictures, once each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from expunge.eval.cases import Observation
from expunge.eval.detectors import OpenDetector
from expunge.eval.generators import threads
from expunge.eval.production import to_tensor
from expunge.eval.reasons import reason
from expunge.eval.score_store import ScoreStore
from expunge.eval.store import ImageStore, Pixels
from expunge.eval.team import ALONE, Team

# A batch is filled up to this many, with one thread: then a score is the same to the last bit
# whatever is judged beside it, before it or by another process.
AT_ONCE = 16


@dataclass(frozen=True)
class Look:
    """What a detector says about one picture.

    Attributes:
        seen: Its scores; None when it could not judge.
        error: Why it could not.
    """

    seen: Observation | None
    error: str | None = None


def judge(
    keys: Sequence[str],
    detector: OpenDetector,
    store: ImageStore,
    *,
    label: str = "judge",
    team: Team = ALONE,
) -> dict[str, Look]:
    """Let the detector look at what it has not judged yet; of several processes, each a share.

    Returns:
        The look at each picture, by its key; of several processes, the first has them all.
    """
    scores, once = ScoreStore(store.root, detector.protocol()), list(dict.fromkeys(keys))
    _look(team.share(once), detector, store, scores, label, quiet=not team.leads)
    team.wait()
    if not team.leads:
        return {}
    scores.reload()
    # What another process could not judge is looked at again here, so that its reason is known.
    return _look(once, detector, store, scores, label, quiet=True)


def _look(
    keys: Sequence[str],
    detector: OpenDetector,
    store: ImageStore,
    scores: ScoreStore,
    label: str,
    *,
    quiet: bool,
) -> dict[str, Look]:
    found: dict[str, Look] = {}
    waiting: list[tuple[str, Pixels]] = []
    with tqdm(total=len(keys), desc=label, unit="image", disable=quiet or None) as bar:

        def clear() -> None:
            looks = observe([pixels for _, pixels in waiting], detector)
            for (key, pixels), look in zip(waiting, looks, strict=True):
                found[key] = look
                if look.seen is not None:
                    scores.put(key, pixels, look.seen)
            waiting.clear()

        for key in keys:
            bar.update()
            pixels = store.read(key)
            if pixels is None:
                found[key] = Look(None, store.why(key))
                continue
            known = scores.get(key, pixels)
            if known is not None:
                found[key] = Look(known)
                continue
            if waiting and waiting[0][1].shape != pixels.shape:
                clear()
            waiting.append((key, pixels))
            if len(waiting) == AT_ONCE:
                clear()
        clear()
    return found


def observe(pictures: Sequence[Pixels], detector: OpenDetector) -> list[Look]:
    """What the detector sees in each of at most `AT_ONCE` pictures of one size, or why not.

    A batch that fails is taken picture by picture, so that one bad picture costs only itself.
    """
    if not pictures:
        return []
    try:
        fill = [pictures[-1]] * (AT_ONCE - len(pictures))
        with threads(1):
            seen = detector.observe(to_tensor([*pictures, *fill]))
        if len(seen) != AT_ONCE:
            raise ValueError(f"the detector gave {len(seen)} answers on {AT_ONCE} pictures")
        for one in seen[: len(pictures)]:
            bad = [label for label in detector.labels if not 0 <= one[label] <= 1]
            if bad:
                raise ValueError(f"the detector gave {one[bad[0]]} for {bad[0]}")
    # Whatever a detector raises means that it did not judge; it must never end up as "not seen".
    except Exception as error:
        if len(pictures) == 1:
            return [Look(None, reason(error))]
        return [observe([picture], detector)[0] for picture in pictures]
    return [Look(one) for one in seen[: len(pictures)]]
