"""A test-only SGLang plugin that watches the packed pool from inside the scheduler process.

Every write becomes a line {layer, text, key, row}: hashes of all tokens up to this one, of the codec's input for it
and of the row it became. Every attention pass checks that the rows it is about to read are the rows last written to
those slots; a difference becomes a line {"corrupt": ...}. The pass itself is a line {read, new}: slots, and new
tokens of each request of a prefill.

The file $BLOCKGTQ_RECORD.spoil, [layer, position, byte], has one bit of a row turned, in the first request of the next
prefill that finds so much of it cached; the file's name then ends in the slot.
"""

import hashlib
import json
import os
from itertools import islice

LAYERS = (0, 1, 3, 29)  # enough to see the difference layers can make


def _digest(tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).numpy().tobytes()).hexdigest()[:16]


def register():
    import torch

    from sglang_blockgtq.backend.cpu import TorchPackedBackend
    from sglang_blockgtq.kernels.layer import TorchLayer
    from sglang_blockgtq.pool import PackedKVPool

    out = open(os.environ["BLOCKGTQ_RECORD"], "a")
    written: dict[tuple[int, int], str] = {}
    texts: dict[int, str] = {}  # of each slot

    def emit(**line):
        out.write(json.dumps(line) + "\n")
        out.flush()

    make_pool, encode = PackedKVPool.__init__, TorchLayer.encode
    watched: dict[int, int] = {}  # identities of the pool's layers, which encode before there is one, to their ids

    def recorded_pool(self, *args, layers, **kwargs):
        make_pool(self, *args, layers=layers, **kwargs)
        watched.update({id(self.layer(i)): i for i in LAYERS if i in self.layers})

    def recorded_encode(self, k, v, loc, positions=None, q=None):
        encode(self, k, v, loc, positions, q)
        layer = watched.get(id(self))
        if layer is None:
            return
        rows = self.gather(loc)
        for t, slot in enumerate(loc.tolist()):
            both = torch.cat([k[t].reshape(-1), v[t].reshape(-1)]).float()
            row = _digest(rows[t])
            written[layer, slot] = row
            emit(layer=layer, text=texts.get(slot), key=_digest(both), row=row)

    def follow(forward_batch, new, table):
        """Name the slots of a batch's new tokens by what was read up to them."""
        tokens = zip(forward_batch.input_ids.tolist(), forward_batch.out_cache_loc.tolist(), strict=True)
        ends = zip(forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist(), new, strict=True)
        for request, length, count in ends:
            text = texts[int(table[request, length - count - 1])] if length > count else ""
            for token, slot in islice(tokens, count):
                texts[slot] = text = hashlib.sha256(f"{text} {token}".encode()).hexdigest()[:16]

    def spoil(backend, forward_batch):
        path = os.environ["BLOCKGTQ_RECORD"] + ".spoil"
        if os.path.exists(path) and forward_batch.forward_mode.is_extend():
            layer, position, byte = json.loads(open(path).read())
            if forward_batch.extend_prefix_lens_cpu[0] > position:
                slot = int(backend.req_to_token_pool.req_to_token[forward_batch.req_pool_indices[0], position])
                backend.pool.layer(layer).rows[slot, byte] ^= 1
                os.rename(path, f"{path}.{slot}")

    prepare = TorchPackedBackend.init_forward_metadata

    def checked_prepare(self, forward_batch):
        spoil(self, forward_batch)
        prepare(self, forward_batch)
        if self.kv_indices is None:
            return
        new = set(forward_batch.out_cache_loc.tolist())
        pool, slots = self.pool, [s for s in self.kv_indices.tolist() if s not in new]
        for layer in set(LAYERS) & set(pool.layers):
            rows = pool.layer(layer).gather(torch.tensor(slots, dtype=torch.int64))
            for slot, row in zip(slots, rows, strict=True):
                if _digest(row) != written.get((layer, slot)):
                    emit(corrupt=slot, layer=layer)
        lengths = None if forward_batch.forward_mode.is_decode() else list(forward_batch.extend_seq_lens_cpu)
        follow(forward_batch, lengths or [1] * forward_batch.batch_size, self.req_to_token_pool.req_to_token)
        emit(read=len(slots), new=lengths)

    PackedKVPool.__init__, TorchLayer.encode = recorded_pool, recorded_encode
    TorchPackedBackend.init_forward_metadata = checked_prepare
