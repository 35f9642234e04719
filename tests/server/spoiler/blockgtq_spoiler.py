"""A test-only SGLang plugin that spoils a row: one bit of the byte, in the slot of the request's token at the position
and in the layer that the file $BLOCKGTQ_SPOIL names, once a step of a prefill has a cached prefix that long.
"""

import json
import os


def register():
    from sglang_blockgtq.backend.cpu import TorchPackedBackend

    prepare = TorchPackedBackend.init_forward_metadata

    def spoiled_prepare(self, forward_batch):
        path = os.environ["BLOCKGTQ_SPOIL"]
        if os.path.exists(path) and forward_batch.forward_mode.is_extend():
            with open(path) as file:
                layer, position, byte = json.load(file)
            if forward_batch.extend_prefix_lens_cpu[0] > position:
                slot = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices[0], position]
                self.pool.layer(layer).rows[slot, byte] ^= 1
                os.rename(path, path + f".{int(slot)}")
        prepare(self, forward_batch)

    TorchPackedBackend.init_forward_metadata = spoiled_prepare
