"""Which adapter lies in which of the device's places, and which one has to go.

Owns the places, the fence before one is written again, and the order in which adapters get theirs. What is
copied, and when that has ended, others say.

A running sequence holds its adapter's place. A place that nobody holds keeps its adapter, because the next
request may want it, until another adapter needs room: then the one that was used longest ago goes, and not
before every step that might have read it has ended.

Who waits for a place is asked in the order of the queue, once a step (`begin_round`, then `admit` of each).
An adapter that finds no place which is nobody's claims one: that of the fewest holders. From then on no later
sequence may start there, so that its holders come to their end and the claim is met; those that are earlier
in the queue than the claim, and all that use other places or none, go on. So nobody waits for longer than the
longest sequence that runs in the claimed place, and those before him in the queue.
"""

from __future__ import annotations

from graphllm.adapter import Adapter, AdapterUpload


class _Place:
    """load_id: of the adapter that lies here or is being copied here, 0 for none. last_step: the newest that
    may read it. last_use: when it was given or given back last, counted in uses."""

    __slots__ = ("adapter", "is_ready", "last_step", "last_use", "num_holders", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.adapter: Adapter | None = None
        self.is_ready = True
        self.num_holders = 0
        self.last_step = 0
        self.last_use = 0

    @property
    def load_id(self) -> int:
        return 0 if self.adapter is None else self.adapter.load_id


class AdapterPlaces:
    """`num_places` places, all empty at first."""

    def __init__(self, num_places: int) -> None:
        self._places = [_Place(number) for number in range(num_places)]
        self._place_of: dict[int, _Place] = {}  # by load, those being copied too
        self._claims: dict[int, _Place] = {}  # by load; one place has one claim
        self._earlier_claims: dict[int, _Place] = {}
        self._wanted: set[_Place] = set()
        self._uploads: list[AdapterUpload] = []
        self._launched_step = 0
        self._completed_step = 0
        self._num_uses = 0

    # -- holders ----------------------------------------------------------------------------------

    def is_ready(self, adapter: Adapter) -> bool:
        """Whether the adapter lies on the device."""
        place = self._place_of.get(adapter.load_id)
        return place is not None and place.is_ready

    def take(self, adapter: Adapter) -> int:
        """Hold the place of an adapter that is ready, for one sequence more; returns its number."""
        place = self._place_of[adapter.load_id]
        assert place.is_ready, "nobody starts before its adapter is there"
        place.num_holders += 1
        self._note_use(place)
        return place.number

    def release(self, number: int) -> None:
        """A sequence that held this place runs no more; steps in flight may still read it."""
        place = self._places[number]
        place.num_holders -= 1
        place.last_step = self._launched_step
        self._note_use(place)

    def step_launched(self, step_id: int) -> None:
        self._launched_step = step_id

    def step_completed(self, step_id: int) -> None:
        self._completed_step = step_id

    @property
    def num_places(self) -> int:
        return len(self._places)

    @property
    def num_holders(self) -> int:
        return sum(place.num_holders for place in self._places)

    # -- who gets a place -------------------------------------------------------------------------

    def begin_round(self) -> None:
        """From here on `admit` is asked in the order of the queue. Claims that nobody repeats are gone."""
        self._earlier_claims, self._claims = self._claims, {}
        self._wanted.clear()

    def admit(self, adapter: Adapter) -> bool:
        """Whether a waiting sequence with this adapter may start now; if not, see to it that it will."""
        place = self._place_of.get(adapter.load_id)
        if place is not None:
            if place in self._claims.values():
                return False
            self._wanted.add(place)
            return place.is_ready
        if adapter.load_id not in self._claims:
            place = self._earlier_claims.get(adapter.load_id)
            if place is None or place in self._claims.values() or place in self._wanted:
                place = self._best_place()
            if place is not None and self._is_idle(place):
                self._begin_upload(adapter, place)
            elif place is not None:
                self._claims[adapter.load_id] = place
        return False

    def _best_place(self) -> _Place | None:
        """The place to clear: idle ones first, and of those the one used longest ago."""
        claimed = self._claims.values()
        free = [
            place
            for place in self._places
            if place.is_ready and place not in claimed and place not in self._wanted
        ]
        return min(free, key=self._cost, default=None)

    def _cost(self, place: _Place) -> tuple[bool, int, bool, int]:
        is_of_use = place.adapter is not None and not place.adapter.is_retired
        return not self._is_idle(place), place.num_holders, is_of_use, place.last_use

    def _is_idle(self, place: _Place) -> bool:
        return place.num_holders == 0 and place.last_step <= self._completed_step

    def _begin_upload(self, adapter: Adapter, place: _Place) -> None:
        self._place_of.pop(place.load_id, None)
        place.adapter, place.is_ready = adapter, False
        self._place_of[adapter.load_id] = place
        self._wanted.add(place)
        self._uploads.append(AdapterUpload(adapter, place.number))

    def _note_use(self, place: _Place) -> None:
        self._num_uses += 1
        place.last_use = self._num_uses

    # -- copies -----------------------------------------------------------------------------------

    def take_uploads(self) -> list[AdapterUpload]:
        """The copies to launch now. To be asked after each round."""
        uploads, self._uploads = self._uploads, []
        return uploads

    def upload_completed(self, upload: AdapterUpload) -> None:
        """The adapter lies in its place."""
        place = self._places[upload.place]
        assert place.adapter is upload.adapter, "a place is given once"
        place.is_ready = True

    # -- what can be asked ------------------------------------------------------------------------

    def check(self, num_holders: int) -> None:
        """Prove that nothing is lost or given twice. Raises AssertionError.

        num_holders: sequences that run with an adapter.
        """
        assert self.num_holders == num_holders, "places are held by nobody, or sequences hold none"
        found = {place.load_id: place for place in self._places if place.adapter is not None}
        assert found == self._place_of, "an adapter lies in two places, or where nobody looks for it"
        assert all(place.is_ready or place.num_holders == 0 for place in self._places)
