"""The scheduler of a continuous batch: which requests the next step of the model computes."""

from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from math import ceil
from typing import Any

from transformers.generation.continuous_batching.cache_allocators.cache_allocator import (
    CacheAllocator,
)
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler


class RoomScheduler(FIFOScheduler):
    """Admits requests in their order, and keeps the pages of ended replies while there is room.

    When the cache is full, the manager removes requests from the batch, and admits none until a
    reply ends. If all running ones are cancelled first, no reply ever ends. The manager also skips
    a request that does not fit, and sends a removed one to the end of the line. A long prompt
    would then wait as long as short ones arrive. And before the cache is full, the manager drops
    all pages of ended replies at once, even those with which a waiting prompt begins.
    """

    name = "room"

    def reset(self) -> None:
        super().reset()
        self.active_requests: dict[str, RequestState]
        self.cached_tokens: dict[str, int] = {}  # of prompts, by request; the engine drops them

    def _infer_request_tokens(self, state: RequestState, admitted: set[str]) -> list[int]:
        known = state.position_offset
        tokens: list[int] = super()._infer_request_tokens(state, admitted)
        if state.position_offset > known:
            self.cached_tokens[state.request_id] = state.position_offset - known
        return tokens

    def add_waiting_request(self, state: RequestState) -> None:
        super().add_waiting_request(state)
        self.cached_tokens.pop(state.request_id, None)  # of a request that had to leave the cache
        waiting: deque[str] = self.waiting_requests_order  # type: ignore[has-type]
        self.waiting_requests_order = deque(sorted(waiting))  # by arrival

    def _try_to_meet_safety_margin(self) -> bool:
        """Keep a part of the cache free, into which the running replies grow."""
        return self._make_room(lambda: self.cache.compute_free_capacity() >= self.safety_margin)

    def _get_waiting_candidates(self) -> list[RequestState]:
        candidates: list[RequestState] = super()._get_waiting_candidates()
        page, active = self._pages().tokens_per_page, self.active_requests
        tokens = len(active) * page  # each running reply may need one more page
        read = sum(map(length, active.values()))
        admitted: list[RequestState] = []
        known: list[int] = []
        for state in candidates[: max(0, self.max_requests_per_batch - len(active))]:
            own = self._known_pages(state)
            known += own
            tokens += (ceil(len(state.remaining_prefill_tokens) / page) - len(own)) * page
            read += length(state)
            enough = partial(self.cache.can_store_request_tokens, state, tokens, dry_run=True)
            fits = read <= self.cache.max_tokens_read and self._make_room(enough, known)
            # The requests behind it wait, too. If nothing runs, the first is admitted anyway.
            if not fits and (active or admitted):
                break
            admitted.append(state)
        return admitted

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """Choose the requests of the next step, as (requests, three other values).

        A step reads no more tokens than the cache has, a page once for each request that shares
        it. So with a common beginning, it may leave out a reply, which then comes first in the
        next step.
        """
        step = super().schedule_batch(token_budget, cache_budget)
        served = {request.state.request_id for request in step[0] or ()}
        served.update(state.request_id for state, _ in self.starved_requests)
        left_out = {
            request: state
            for request, state in self.active_requests.items()
            if state.status == RequestStatus.DECODING and request not in served
        }
        if left_out:
            self.active_requests = left_out | self.active_requests
        return step

    def finish_request(self, request_id: str) -> None:
        self._drop_its_last_page_first(request_id)
        super().finish_request(request_id)

    def _drop_its_last_page_first(self, request_id: str) -> None:
        for allocator in self.cache.cache_allocators.values():
            # Pages are dropped in this order, and a page is of no use without those before it.
            allocator.block_table.get(request_id, []).reverse()

    def _pages(self) -> CacheAllocator:
        """Return the pages that requests share: all of a model whose layers have full attention."""
        pages: CacheAllocator = next(iter(self.cache.cache_allocators.values()))
        return pages

    def _known_pages(self, state: RequestState) -> list[int]:
        """Return the pages that begin a waiting prompt, as far as they are in the cache."""
        pages: list[int] = self._pages().match_prefix_blocks(state.remaining_prefill_tokens)
        return pages

    def _make_room(self, enough: Callable[[], bool], spared: Collection[int] = ()) -> bool:
        """Drop pages of ended replies until there is `enough` room. Return whether there is.

        Those that no waiting prompt begins with go first, the least recently used before others;
        then those of the last prompt in line. The `spared` ones stay.
        """
        self.cache.pool.try_to_free_sectors()
        pages = self._pages()
        ended = pages.ledger.cached_blocks  # in the order of their last use
        if ended and not enough():
            for state in reversed(super()._get_waiting_candidates()):
                for page in reversed(self._known_pages(state)):
                    if page in ended:
                        ended[page] = ended.pop(page)
        while not enough():
            oldest = next(iter(ended), None)
            if oldest is None or oldest in spared:
                return False
            del ended[oldest], pages.ledger.hash_to_block[pages.ledger.block_to_hash.pop(oldest)]
            pages.pool.free_blocks(pages.index, [oldest])
        return True

    def clear_cancelled_requests(self) -> list[RequestState]:
        active = len(self.active_requests)
        for request in list(self._requests_to_cancel):
            self._drop_its_last_page_first(request)
        cancelled: list[RequestState] = super().clear_cancelled_requests()
        if len(self.active_requests) < active:
            self.block_new_requests = False
        for state in cancelled:  # it may have been admitted after the engine dropped it
            self.cached_tokens.pop(state.request_id, None)
        return cancelled


def length(state: RequestState) -> int:
    """Return the tokens that a request has in the cache, or has yet to read."""
    return int(state.current_len() + len(state.remaining_prefill_tokens))
