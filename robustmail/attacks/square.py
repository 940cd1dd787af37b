"""Square (Andriushchenko et al. 2020) with the outcomes of torchattacks in less time.

In l-inf a query tries one square, at the same place in all images, and few are better than what an image has already.
So an image tries several of its next squares in one pass, and goes on after the first that is better: it accepts the
same squares as if it tried one at a time. The model is asked nothing that it knows already, and, where it can, computes
what a square reaches only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from robustmail.attacks.steps import per_image
from robustmail.attacks.view import ModelView, rows_in_pass
from robustmail.functional import ce, gap
from robustmail.models.windowed import KnownImages

__all__ = ["square_l2", "square_linf"]

Place = tuple[int, int]
"""(top, left)"""


class Squares(NamedTuple):
    """Consecutive queries with squares of one side: their (top, left) [Q, 2], and the change of their pixels
    [Q, C, 1, 1]."""

    side: int
    place: Tensor
    change: Tensor


def square_linf(attack: Any, x: Tensor, y: Tensor) -> tuple[None, Tensor]:
    """(None, the images with the smallest margins found), as Square.attack_single_run returns them.

    x: [B, C, H, W]. y: [B].
    """
    _, c, _, w = x.shape
    with torch.no_grad():
        found = torch.clamp(x + attack.eps * attack.random_choice([len(x), c, 1, w]), 0, 1)
        margin, loss = _margin_and_loss(attack, attack.get_logits(found), y)
        search = _Search(attack, x, y, found, loss)
        search.leave(margin <= 0)
        for squares in _drawn(attack, x):
            if not len(search.rows):
                break
            search.try_all(squares)
        found[search.rows] = search.images
    return None, found


def _drawn(attack: Any, x: Tensor) -> Iterator[Squares]:
    """The squares of all queries, drawn in torchattacks' order; where the side changes, a new group begins."""
    _, c, h, w = x.shape
    sides = (min(max(_side(attack, query, h, w), 1), h, w) for query in range(attack.n_queries))
    for side, queries in itertools.groupby(sides):
        drawn = [(_place(h, w, side), attack.random_choice([c, 1, 1])) for _ in queries]
        place = torch.tensor([place for place, _ in drawn], device=x.device)
        yield Squares(side, place, 2.0 * attack.eps * torch.stack([change for _, change in drawn]))


class _Search:
    """The best images so far of those that are not broken, and what they try next.

    rows: of the images in the batch, [M]. images: [M, C, H, W]. loss: of these images, [M].
    next: the square that each image tries next, [M].
    ahead: squares that an image tries in one pass, at most: as many as it lately took to find a better one.
    """

    def __init__(self, attack: Any, x: Tensor, y: Tensor, found: Tensor, loss: Tensor) -> None:
        self.attack, self.found, self.most_rows = attack, found, rows_in_pass(attack, len(x))
        self.rows, self.images, self.y, self.loss = torch.arange(len(x), device=x.device), found.clone(), y, loss
        self.low, self.high = (x - attack.eps).clamp(min=0), (x + attack.eps).clamp(max=1)
        self.next, self.ahead = torch.zeros_like(self.rows), 1
        self.known: KnownImages | None = None

    def try_all(self, squares: Squares) -> None:
        """Let every image try the squares one after another, each on the best image so far."""
        self.known = None  # frees its memory first
        self.known, self.next = self._known_images(squares.side), torch.zeros_like(self.rows)
        while bool((self.next < len(squares.place)).any()):
            self._try_some(squares)

    def _try_some(self, squares: Squares) -> None:
        """Ask about the next squares of as many images as fill a pass, the nearest ones of each first."""
        n, device = len(squares.place), self.rows.device
        image = (self.next < n).nonzero().flatten()[: self.most_rows]
        ahead = min(2 * self.most_rows // len(image), self.ahead, n - int(self.next[image].min()))
        query = self.next[image] + torch.arange(ahead, device=device)[:, None]  # [ahead, M]
        is_left, query = query < n, query.clamp(max=n - 1)
        before, low, high = (_squares(part, image.expand_as(query), squares.place[query], squares.side)
                             for part in (self.images, self.low, self.high))  # fmt: skip
        after = torch.clamp(before + squares.change[query], low, high)
        wanted = (after != before).flatten(2).any(2) & is_left  # of the others the model has been asked already
        asked = wanted & (wanted.flatten().cumsum(0).view_as(wanted) <= self.most_rows)  # of each image the first
        left_out = wanted & ~asked
        settled = torch.where(left_out.any(0), left_out.to(torch.uint8).argmax(0), ahead)
        self.next[image] = (self.next[image] + settled).clamp(max=n)
        if asked.any():
            image, query = image.expand_as(query)[asked], query[asked]
            self._ask(image, query, squares.place[query], after[asked])

    def _ask(self, image: Tensor, query: Tensor, place: Tensor, square: Tensor) -> None:
        """Ask the model about squares [R, C, side, side] of images `image` [R], and accept the first better of each."""
        margin, loss = _margin_and_loss(self.attack, self._logits(image, place, square), self.y[image])
        better = ((loss < self.loss[image]) | (margin <= 0)).nonzero().flatten()
        first = torch.full_like(self.rows, len(image)).scatter_reduce(0, image[better], better, "amin")
        which = (first < len(image)).nonzero().flatten()
        self.ahead = max(len(image) // max(len(which), 1), 1)
        if not len(which):
            return
        first = first[which]
        self.loss[which], self.next[which] = self.loss[which].minimum(loss[first]), query[first] + 1
        _put(self.images, which, place[first], square[first])
        if self.known is not None:
            self.known.accept(first)
        self.leave(torch.zeros_like(self.rows, dtype=torch.bool).index_put((which,), margin[first] <= 0))

    def leave(self, is_broken: Tensor) -> None:
        """Store the images that are broken, and attack the others only. is_broken: [M]."""
        if not is_broken.any():
            return
        self.found[self.rows[is_broken]] = self.images[is_broken]
        state = (self.rows, self.images, self.low, self.high, self.y, self.loss, self.next)
        self.rows, self.images, self.low, self.high, self.y, self.loss, self.next = (part[~is_broken] for part in state)
        if self.known is not None:
            self.known.keep(~is_broken)

    def _logits(self, image: Tensor, place: Tensor, square: Tensor) -> Tensor:
        if self.known is not None:
            return self.known(place, square, image)
        tried = self.images[image]
        _put(tried, torch.arange(len(tried), device=tried.device), place, square)
        return cast(Tensor, self.attack.get_logits(tried))

    def _known_images(self, side: int) -> KnownImages | None:
        """What computes a square's reach only, from a quarter of the image's side on, if the model can do so."""
        if side > min(self.images.shape[-2:]) // 4 or not isinstance(self.attack.model, ModelView):
            return None
        return self.attack.model.known_images(self.images, side)


def _squares(images: Tensor, image: Tensor, place: Tensor, side: int) -> Tensor:
    """The squares at `place` [..., 2] of the images at positions `image` [...], [..., C, side, side]."""
    return images.unfold(2, side, 1).unfold(3, side, 1)[image, :, place[..., 0], place[..., 1]]


def _put(images: Tensor, image: Tensor, place: Tensor, square: Tensor) -> None:
    """Write squares [R, C, side, side] into the images at positions `image` [R], at `place` [R, 2]."""
    channels, side = (torch.arange(n, device=images.device) for n in square.shape[1:3])
    row, column = (place[:, i, None] + side for i in (0, 1))
    at = image[:, None, None, None], channels[:, None, None], row[:, None, :, None], column[:, None, None, :]
    images[at] = square


def _margin_and_loss(attack: Any, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(z_y - max_{j != y} z_j, which is 0 or less if misclassified; what Square makes smaller), each [B]."""
    margin = gap(logits, y)
    return margin, margin if attack.loss == "margin" else -ce(logits, y)


def _side(attack: Any, query: int, h: int, w: int) -> int:
    """Side of the square that covers this query's share of an image of h x w pixels."""
    return round(math.sqrt(attack.p_selection(query) * h * w))


def _place(h: int, w: int, side: int) -> Place:
    """(top, left) of a square at a random place of images [B, C, h, w]; side: at most h and w."""
    top, left = (int((size - side) * torch.rand([1])) for size in (h, w))
    return top, left


def square_l2(attack: Any, x: Tensor, y: Tensor) -> tuple[None, Tensor]:
    """As `square_linf`, in l2: each query moves what one window holds, and what the ball has left, to another window.

    A window has an odd side of 3 at least, or the image's shorter side where that is less. x: [B, C, H, W]. y: [B].
    """
    _, _, h, w = x.shape
    with torch.no_grad():
        found = torch.clamp(x + attack.normalize_delta(_tiles(attack, x)) * attack.eps, 0, 1)
        margin, loss = attack.margin_and_loss(found, y)
        rows = (margin > 0).nonzero().flatten()  # of the images that are still attacked
        best, clean, y, loss = (part[rows] for part in (found, x, y, loss))
        for query in range(attack.n_queries):
            if not len(rows):
                break
            side = min(max(_side(attack, query, h, w), 3) | 1, h, w)
            delta = _moved(attack, best - clean, side, _place(h, w, side), _place(h, w, side))
            tried = torch.clamp(clean + attack.normalize_delta(delta) * attack.eps, 0, 1)
            margins, losses = attack.margin_and_loss(tried, y)
            is_broken = margins <= 0
            best = torch.where(per_image((losses < loss) | is_broken), tried, best)
            loss = loss.minimum(losses)
            if is_broken.any():
                found[rows[is_broken]] = best[is_broken]
                rows, best, clean, y, loss = (part[~is_broken] for part in (rows, best, clean, y, loss))
        found[rows] = best
    return None, found


def _tiles(attack: Any, x: Tensor) -> Tensor:
    """Bumps of random sign side by side, [B, C, H, W]; those at the border are cut where they do not fit."""
    n, c, h, w = x.shape
    side = max(min(h // 5, w), 1)
    first = (h - 5 * side) // 2 if h >= 5 * side else 0
    delta = torch.zeros_like(x)
    for top in range(first, first + h // side * side, side):
        for left in range(first, first + w // side * side, side):
            bump = attack.eta(side) * attack.random_choice([n, c, 1, 1])
            part = delta[:, :, top : top + side, left : left + side]
            part += bump[:, :, : part.shape[2], : part.shape[3]]
    return delta


def _moved(attack: Any, delta: Tensor, side: int, to: Place, away: Place) -> Tensor:
    """A perturbation [B, C, H, W] in which the window `to` has a new bump on top of its old one, with what the window
    `away` held, which becomes 0, and what the ball has left. Both windows are squares of `side`."""
    n, c = delta.shape[:2]
    both = torch.zeros_like(delta)
    here, there = (delta[..., top : top + side, left : left + side] for top, left in (to, away))
    for (top, left), window in ((to, here), (away, there)):
        both[..., top : top + side, left : left + side] = window
    bump = attack.eta(side) * attack.random_choice([n, c, 1, 1])
    bump = bump.contiguous() + here / (1e-12 + _root_of_squares(here))
    length = attack.lp_norm(delta)
    unused = (torch.full_like(length, attack.eps) ** 2 - length**2).clamp(min=0)
    bump = bump / (1e-12 + _root_of_squares(bump)) * (unused / c + attack.lp_norm(both) ** 2).sqrt()
    there.zero_()
    here.copy_(bump)
    return delta


def _root_of_squares(window: Tensor) -> Tensor:
    """Of each channel, [B, C, 1, 1]."""
    return window.square().sum(dim=(-2, -1), keepdim=True).sqrt()
