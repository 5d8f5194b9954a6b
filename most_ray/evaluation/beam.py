"""The beam search of one record: which hypotheses continue, which have ended, and when no better one is possible. Needs no model."""

from __future__ import annotations

from collections.abc import Sequence


class BeamSearch:
    """Beam search with `width` beams (W) and the stop tokens `stops`.

    The score of a hypothesis is its log probability divided by its number of tokens to the power of `length_penalty`, as in transformers;
    both include the stop token. A hypothesis that reaches `cap` tokens without a stop token counts too. The search ends when W hypotheses
    have ended and the best beam, even with no further loss, would not beat the worst of them; or at the cap.
    """

    def __init__(self, width: int, stops: Sequence[int], cap: int, length_penalty: float) -> None:
        self._width, self._stops, self._cap, self._penalty = width, frozenset(stops), cap, length_penalty
        self._beams: list[tuple[float, list[int]]] = [(0.0, [])]  # log probability, tokens
        self._ended: list[tuple[float, list[int], int | None]] = []  # score, tokens, stop token; the best first
        self._length = 0
        self.done = False
        # Tokens of each beam that can matter: enough for W beams to continue even if the most probable ones are stop tokens.
        self.n_candidates = width * (1 + len(self._stops))

    def advance(self, log_probabilities: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Extend the beams by one token, given each beam's most probable tokens, (W, n_candidates); at the first call all beams are equal.

        Returns for each of the W beams that continue the index of the beam that it extends, and its new token; zeros if the search is done.
        """
        if self.done:
            return [0] * self._width, [0] * self._width
        self._length += 1
        candidates = [
            (score + value, parent, token)
            for parent, (score, _) in enumerate(self._beams)
            for value, token in zip(log_probabilities[parent], tokens[parent], strict=True)
        ]
        grown: list[tuple[float, list[int]]] = []
        parents: list[int] = []
        candidates.sort(key=lambda candidate: -candidate[0])
        for rank, (total, parent, token) in enumerate(candidates[: self.n_candidates]):
            history = self._beams[parent][1]
            if token in self._stops:
                if rank < self._width:  # one that ranks lower is worse than every beam
                    self._end(total, history, token)
            elif len(grown) < self._width:
                grown.append((total, [*history, token]))
                parents.append(parent)
        self._beams = grown
        if self._length == self._cap:
            for total, history in grown:
                self._end(total, history, None)
            self.done = True
        elif len(self._ended) >= self._width:
            self.done = self._ended[self._width - 1][0] >= grown[0][0] / self._length**self._penalty
        return _filled(parents, self._width), _filled([history[-1] for _, history in grown], self._width)

    def _end(self, total: float, tokens: list[int], stop: int | None) -> None:
        self._ended.append((total / self._length**self._penalty, tokens, stop))
        self._ended.sort(key=lambda hypothesis: -hypothesis[0])

    def best(self) -> tuple[list[int], int | None]:
        """The best hypothesis' tokens, and its stop token; None if it reached the cap."""
        return self._ended[0][1:]


def _filled(values: list[int], width: int) -> list[int]:
    """Fill up to W values by repeating the last: the vocabulary may be too small for so many beams."""
    return values + [values[-1] if values else 0] * (width - len(values))
