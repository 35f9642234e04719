"""A test-only SGLang plugin for a GPU: what start-up takes of its memory, and rows that sleep has spoiled.

The lines {"taken"} of the record are bytes of this process's tensors before the table is there and once attention is
ready. After each wake-up every row is NaN and every request's table points nowhere, until the plugin sees to it. With
$BLOCKGTQ_NO_MEMORY memory runs out while a graph is captured.
"""

import functools
import gc
import json
import os


def register():
    import torch
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    from sglang_blockgtq import runtime
    from sglang_blockgtq.backend.cuda import TritonPackedBackend
    from sglang_blockgtq.pool import packed_pool

    out = open(os.environ["BLOCKGTQ_RECORD"], "a")

    def emit(**line):
        out.write(json.dumps(line) + "\n")
        out.flush()

    def taken() -> int:
        gc.collect()
        return torch.cuda.memory_allocated()

    start, init = runtime.start, TritonPackedBackend.__init__

    def watched_start(*args, **kwargs):
        emit(taken=taken())
        return start(*args, **kwargs)

    def watched_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        emit(taken=taken())

    resume = SchedulerWeightUpdaterManager.resume_memory_occupation

    @functools.wraps(resume)  # the plugin's check of SGLang reads its parameters
    def spoiled_resume(self, *args, **kwargs):
        done = resume(self, *args, **kwargs)
        runner = self.tp_worker.model_runner
        for layer in packed_pool(runner.token_to_kv_pool).layers.values():
            layer.rows.fill_(0xFF)
        runner.req_to_token_pool.req_to_token.fill_(1 << 30)
        return done

    decode = TritonPackedBackend.forward_decode

    def starved_decode(self, *args, **kwargs):
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(self, *args, **kwargs)

    if "BLOCKGTQ_NO_MEMORY" in os.environ:
        TritonPackedBackend.forward_decode = starved_decode
    runtime.start = watched_start
    TritonPackedBackend.__init__ = watched_init
    SchedulerWeightUpdaterManager.resume_memory_occupation = spoiled_resume
