"""One model that reads growing texts, with a cache of keys and values."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xelm.inference import blocks
from xelm.inference.blocks import Block, Text, capacity, slots_for
from xelm.inference.parameter_cache import ParameterCache
from xelm.models.cache import LONGEST_PIECE, ring_slots
from xelm.models.config import ModelConfig
from xelm.models.head import target_log_probabilities
from xelm.models.narrow import compute_dtype
from xelm.models.parameters import compiled_by_model, inference_bytes

PIECES = (16, 64, LONGEST_PIECE)
"""Numbers of tokens of a text that are read in one call, beside one. Fewer than the first take as
long, and the last fills the matrix units."""
ROWS = (1, 4, 16, 64)
"""Numbers of texts of which pieces are read in one call; few, as a program is compiled for each
shape."""
TOKENS_A_CALL = 4096
"""Largest number of tokens that are read in one call."""
SCORES_A_PIECE = 2**19
"""Number of queries times slots above which pieces have the second of their sizes at most: 256
tokens at 8,192 slots take eleven times as long as 64 on a CPU, since their scores fit no cache."""
GROWTH = 4
"""Factor by which a block grows while a prompt is read, up to what the prompt needs."""
LEAST_SHARED = PIECES[0]
"""Number of tokens from which on the beginning that two texts share is copied: reading fewer takes
no longer."""


class NoMemory(Exception):
    """Raised where the cache of a text does not fit into the memory."""


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device is out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


class Decoder:
    """Reads texts as they grow; each is in its cache from `open` until `close`."""

    def __init__(
        self,
        model: ModelConfig,
        parameters: Callable[[], Any],
        dtype: str = "float32",
        *,
        memory: ParameterCache | None = None,
        keep: int = 0,
    ):
        """parameters: called at each reading; returns parameters `for_inference`. dtype: of their
        weights. memory: in whose account the cache is; None: it is not limited. keep: number of
        closed texts that stay, for texts that begin as they do."""
        self._model, self._parameters, self._dtype = model, parameters, compute_dtype(dtype)
        self._memory, self._keep = memory, keep
        self._parameter_bytes = inference_bytes(model, dtype)
        self._texts: dict[Text, None] = {}
        self._shared: list[Block] = []
        """Blocks of the texts that grow token by token."""
        self._changed = False
        """Whether texts have joined or left the shared blocks since they were arranged."""
        self._kept: list[Text] = []
        """Closed texts, the most recently used last."""
        self.bytes = 0
        """Size of all blocks."""
        self.tokens_read = 0
        """Number of tokens that were read so far."""

    @property
    def texts(self) -> list[Text]:
        """The open texts."""
        return list(self._texts)

    def open(self, target: Sequence[int], reserved: int = 0, *, scored: bool = False) -> Text:
        """A text with these ids, of which nothing was read, or as much as another text has in
        common with it. reserved: number of ids that it is expected to have. scored: whether the log
        probabilities of its ids are wanted. Raises NoMemory."""
        source, common = self._source(target, scored)
        slots = slots_for(common + min(PIECES[-1], len(target) - common) + 1)
        block = self._allocated(1, slots) if source is None else self._copied(source, slots)
        text = block.texts[0] = Text(target, block, reserved=reserved)
        if source is not None:
            text.ids, text.stored = source.ids[:common], source.stored
            text.scores = None if source.scores is None else source.scores[: common + 1]
            if source in self._kept:  # its own memory may have been needed for the copy
                self._kept.remove(source)
                self._kept.append(source)
        self._texts[text] = None
        return text

    def source_to_come(self, target: Sequence[int]) -> Text | None:
        """An open text that will soon have much more in common with these ids than what was read by
        now of any; waiting for it saves reading that again."""
        _, now = self._source(target, False)
        for text in self._texts:
            if len(text.ids) < len(text.target):
                common = _common(target, text.target) - 1
                if common >= max(len(text.ids), now + LEAST_SHARED):
                    return text
        return None

    def _source(self, target: Sequence[int], scored: bool) -> tuple[Text | None, int]:
        """The text that was read furthest along these ids, and the number of tokens to take over:
        all in common but the last, which is read again for the logits after it."""
        best, most = None, LEAST_SHARED - 1
        for text in itertools.chain(self._kept, self._texts):
            if len(text.ids) > most and not (scored and text.scores is None):
                common = _common(target, text.ids) - 1
                if common > most and self._has_kept(text, common):
                    best, most = text, common
        return best, most if best else 0

    def _has_kept(self, text: Text, count: int) -> bool:
        """Whether the caches have what a token after the first so many of a text sees; those of
        local layers lose what lies further back than their window."""
        ring, window = ring_slots(self._model), self._model.local_window
        stored = max(text.stored, len(text.ids) + 1)
        if ring is None or window is None or text.block.slots < ring or stored <= ring:
            return True
        return stored - ring <= count - window

    def close(self, text: Text) -> None:
        """Frees the row of a text. Its contents may stay for texts that begin as it does."""
        del self._texts[text]
        text.open, text.target = False, text.ids
        scarce = self._memory is not None and 2 * self._memory.reserved > self._memory.device_bytes
        worth = self._keep and len(text.ids) > LEAST_SHARED and not scarce
        if worth and self._put_aside(text):
            return
        self._free(text)

    def _put_aside(self, text: Text) -> bool:
        """Keeps a closed text in a block of its own, if there is memory for it."""
        for other in list(self._kept):
            if len(other.ids) <= len(text.ids) and _common(other.ids, text.ids) == len(other.ids):
                self._drop(other)
        if text.block in self._shared:
            try:
                self._leave(text, slots_for(len(text.ids)))
            except NoMemory:
                return False
        self._kept.append(text)
        while len(self._kept) > self._keep:
            self._drop(self._kept[0])
        return True

    def drop_kept(self) -> None:
        """Frees the memory of all closed texts."""
        for text in list(self._kept):
            self._drop(text)

    def _drop(self, text: Text) -> None:
        self._kept.remove(text)
        self._free(text)

    def _free(self, text: Text) -> None:
        blocks.remove(text)
        if text.block in self._shared:
            self._changed = True
            if not text.block.count:
                self._shared.remove(text.block)
                self._reserve(-text.block.bytes)
        else:
            self._reserve(-text.block.bytes)

    def reset(self) -> None:
        """Closes all texts and frees all memory."""
        for text in self._texts:
            text.open = False
        self._texts, self._shared, self._kept = {}, [], []
        self._reserve(-self.bytes)

    def rewind(self, text: Text) -> None:
        """Has a text read again from its beginning."""
        text.ids, text.scores = [], []

    def read(self, unread: Mapping[Text, Sequence[int]], *, scored: bool = False) -> None:
        """Reads the next ids of some texts. scored: whether their log probabilities are added to
        those of each text. Raises NoMemory, after which some may have been read."""
        rest = {text: list(ids) for text, ids in unread.items() if len(ids)}
        self._read_tokens({text: ids for text, ids in rest.items() if len(ids) == 1}, scored)
        rest = {text: ids for text, ids in rest.items() if len(ids) > 1}
        while rest:
            pieces: dict[tuple[int, int], list[Text]] = {}
            for text, ids in rest.items():
                size = self.piece(text, len(ids))
                pieces.setdefault((size, self._room(text, size)), []).append(text)
            for (size, _), texts in pieces.items():
                for some in _calls(texts, size):
                    part = {text: rest[text][:size] for text in some}
                    self._read_apart(part, size, scored)
                for text in texts:
                    rest[text] = rest[text][size:]
            rest = {text: ids for text, ids in rest.items() if ids}

    def piece(self, text: Text, unread: int) -> int:
        """`piece_size` of the next ids of a text."""
        return piece_size(len(text.ids), unread)

    def cost(self, text: Text) -> float:
        """`reading_cost` of the next token of a text."""
        return reading_cost(self._model, len(text.ids))

    def _room(self, text: Text, more: int) -> int:
        """Moves a text to a block of its own, if it has none with slots for so many more ids;
        returns the slots of its block."""
        needed, slots = slots_for(len(text.ids) + more), text.block.slots
        if text.block in self._shared:
            self._leave(text, max(slots, needed))
        elif slots < needed:
            most = slots_for(max(len(text.target) + 1, len(text.ids) + more))
            self._leave(text, max(needed, min(most, GROWTH * slots)))
        return text.block.slots

    def _leave(self, text: Text, slots: int) -> None:
        """Moves a text to a block of its own."""
        own = self._copied(text, slots)
        self._free(text)
        text.block, text.index, own.texts[0] = own, 0, text

    def _read_tokens(self, unread: Mapping[Text, list[int]], scored: bool) -> None:
        """Reads one id of each of some texts, in blocks that they share."""
        if not unread:
            return
        self._arrange(unread)
        by_block: dict[int, list[Text]] = {}
        for text in unread:
            by_block.setdefault(id(text.block), []).append(text)
        for texts in by_block.values():
            block, part = texts[0].block, {text: unread[text] for text in texts}
            if 4 * len(texts) >= len(block.texts):
                # All rows are computed, where they lie.
                self._call(block, part, 1, scored)
            else:
                self._read_apart(part, 1, scored)

    def _read_apart(self, unread: Mapping[Text, list[int]], size: int, scored: bool) -> None:
        """Reads ids of texts with equally many slots, apart from others in their blocks."""
        texts = list(unread)
        if len(texts) == 1 and len(texts[0].block.texts) == 1:
            self._call(texts[0].block, unread, size, scored)
            return
        slots, places = texts[0].block.slots, [(text.block, text.index) for text in texts]
        together = self._allocated(capacity(len(texts)), slots)
        for index, text in enumerate(texts):
            blocks.move(text, together, index)
        self._call(together, unread, size, scored)
        for text, (block, index) in zip(texts, places):
            blocks.move(text, block, index)
        self._reserve(-together.bytes)

    def _call(
        self, block: Block, unread: Mapping[Text, list[int]], size: int, scored: bool
    ) -> None:
        """Reads ids of texts in one block; size: the number of columns."""
        tokens = np.zeros((len(block.texts), size), np.int32)
        counts = np.zeros(len(block.texts), np.int32)
        for text, ids in unread.items():
            tokens[text.index, : len(ids)] = ids
            counts[text.index] = len(ids)
        extend = _extender(self._model, self._dtype)
        found, block.logits, block.cache = extend(
            self._parameters(),
            tokens,
            counts,
            block.cache._replace(length=block.lengths),
            block.logits,
            scored=scored,
        )
        self.tokens_read += int(counts.sum())
        found = np.asarray(found, np.float64).tolist() if scored else []
        for text, ids in unread.items():
            if not scored:
                text.scores = None
            elif text.scores is not None:
                own = found[text.index][: len(ids)]
                if not text.ids:
                    own[0] = float("nan")  # follows nothing
                # What was taken over from another text is known already.
                text.scores += own[len(text.scores) - len(text.ids) :]
            text.stored = max(text.stored, len(text.ids) + size)
            text.ids += ids

    def _arrange(self, growing: Iterable[Text]) -> None:
        """Brings texts that grow token by token into blocks that they share, as `blocks.grouped`
        says: when one has no slot for its next id, when texts have come or gone, and then only if a
        step would otherwise read many more bytes than it need."""
        joining = [text for text in growing if text.block not in self._shared]
        full = any(text.block.slots <= len(text.ids) for text in growing)
        if not (joining or full or self._changed):
            return
        texts = [t for block in self._shared for t in block.texts if t is not None] + joining
        sizes = self._row_bytes, self._parameter_bytes
        plan = blocks.grouped({text: text.slots_needed for text in texts}, *sizes)
        self._changed = False
        if not (joining or full):
            now = [(len(block.texts), block.slots) for block in self._shared]
            best = [(capacity(len(some)), slots) for slots, some in plan]
            least = blocks.step_bytes(best, *sizes)
            if blocks.step_bytes(now, *sizes) <= blocks.WORTH_MOVING * least:
                return
        for slots, some in plan:
            self._gather(slots, some)

    def _gather(self, slots: int, texts: list[Text]) -> None:
        """Brings texts into one shared block with so many slots."""
        candidates = [b for b in (*self._shared, texts[0].block) if b.slots == slots]
        block = next((b for b in candidates if len(texts) <= len(b.texts) < 4 * len(texts)), None)
        others = {id(text): text for text in texts if text.block is not block}
        if block is not None:
            # Texts of another group, which go elsewhere later, may take its rows until then.
            free = [index for index, text in enumerate(block.texts) if text is None]
            if len(free) < len(others):
                block, others = None, {id(text): text for text in texts}
        if block is None:
            block = self._allocated(capacity(len(texts)), slots)
        if block not in self._shared:
            self._shared.append(block)
        free = [index for index, text in enumerate(block.texts) if text is None]
        for index, text in zip(free, others.values()):
            before = text.block
            blocks.move(text, block, index)
            if not before.count:
                if before in self._shared:
                    self._shared.remove(before)
                self._reserve(-before.bytes)

    def _allocated(self, rows: int, slots: int) -> Block:
        """A block without texts. Raises NoMemory."""
        make = functools.partial(blocks.empty_block, self._model, rows, slots, self._dtype)
        return self._made(make, blocks.block_bytes(self._model, rows, slots, self._dtype))

    def _copied(self, text: Text, slots: int) -> Block:
        """A block of one row with what is kept of a text. Raises NoMemory."""

        def make() -> Block:
            return blocks.copied(text, slots)

        return self._made(make, blocks.block_bytes(self._model, 1, slots, self._dtype))

    def _row_bytes(self, slots: int) -> int:
        return blocks.row_bytes(self._model, slots, self._dtype)

    def _made(self, make: Callable[[], Block], size: int) -> Block:
        """A new block of so many bytes. Raises NoMemory, also where the device has less memory than
        the account says."""
        self._reserve(size)
        try:
            return make()
        except jax.errors.JaxRuntimeError as error:
            self._reserve(-size)
            if not out_of_memory(error):
                raise
            self.drop_kept()
            raise NoMemory(size) from error

    def _reserve(self, more: int) -> None:
        """Accounts for so many further bytes, or so many less. Raises NoMemory."""
        if self._memory and not self._memory.reserve(self, more, self._parameter_bytes):
            raise NoMemory(more)
        self.bytes += more


def piece_size(read: int, unread: int) -> int:
    """Number of columns of the call that reads the next of so many ids of a text, of which so many
    were read."""
    slots = slots_for(read + min(unread, PIECES[-1]))
    sizes = PIECES if PIECES[-1] * slots <= SCORES_A_PIECE else PIECES[:-1]
    return _next_of(unread, sizes)


def reading_cost(model: ModelConfig, read: int) -> float:
    """How many times as long as the first token of a text the next one takes to be read after so
    many, by the operations of attention beside those of all else."""
    slots = slots_for(read + 1)
    attention = 2 * model.layer_count * model.head_count * model.head_size * slots
    return 1 + attention / model.active_parameter_count


def tokens_within(most: float, unread: int) -> int:
    """How many of the unread ids of a text are read where `most` may be: at least the smallest
    piece."""
    if most >= unread:
        return unread
    # Whole pieces: others would take as long as these.
    return min(unread, max(size for size in PIECES if size <= max(most, PIECES[0])))


def _calls(texts: list[Text], size: int) -> list[list[Text]]:
    """Texts of which `size` tokens are read, split by calls."""
    counts = [count for count in ROWS if count * size <= TOKENS_A_CALL]
    parts, first = [], 0
    while first < len(texts):
        count = _next_of(len(texts) - first, counts)
        parts.append(texts[first : first + count])
        first += count
    return parts


def _next_of(count: int, sizes: Sequence[int]) -> int:
    """The size that is used next for so many things: the smallest that takes them all, if they fill
    three quarters of it or there is no smaller one; otherwise the next smaller one."""
    size = next((size for size in sizes if size >= count), sizes[-1])
    below = [smaller for smaller in sizes if smaller < size]
    return below[-1] if below and 4 * count < 3 * size else size


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of ids with which both begin."""
    low, high = 0, min(len(one), len(other))
    if one[:LEAST_SHARED] != other[:LEAST_SHARED]:
        high = min(high, LEAST_SHARED)  # most texts differ soon
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@compiled_by_model(donate_argnums=(3, 4), static_argnames="scored")
def _extender(network, tokens, counts, cache, logits, *, scored):
    hidden, longer = network.extend(tokens, counts, cache)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    ends = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    following = jnp.where(counts[:, None] > 0, network.logits(ends), logits)
    if not scored:
        return None, following, longer
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, :1], axis=-1)
    if tokens.shape[1] > 1:
        states, head = network.output(hidden[:, :-1])
        inner = target_log_probabilities(states, head, tokens[:, 1:])
        found = jnp.concatenate([found, inner], axis=1)
    return found, following, longer
