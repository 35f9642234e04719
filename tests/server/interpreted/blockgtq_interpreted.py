"""A test-only SGLang plugin: the CUDA backend on the CPU, its kernels in Triton's interpreter.

Decode steps go the way of a CUDA graph: metadata over the graph's buffers once for each batch size, and from then on
only what a graph would run, over buffers that hold the requests of the step.
"""

from types import SimpleNamespace

MOST = 8  # requests of a decode batch


def register():
    import torch

    from sglang_blockgtq import backend
    from sglang_blockgtq.backend.cuda import TritonPackedBackend
    from sglang_blockgtq.pool import PackedKVPool

    init = PackedKVPool.__init__

    def init_with_kernels(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.tables = self._device_tables()
        self.encoders = self._encoders()

    class InterpretedBackend(TritonPackedBackend):
        graph = None

        def _warm_up(self, runner):
            pass

        def init_forward_metadata(self, forward_batch):
            if not forward_batch.forward_mode.is_decode():
                super().init_forward_metadata(forward_batch)
                return
            if self.graph is None:
                self.init_cuda_graph_state(MOST, MOST)
                self.graph = SimpleNamespace(
                    lengths=torch.ones(MOST, dtype=torch.int64), rows=torch.zeros(MOST, dtype=torch.int64), captured={}
                )
            size, graph = forward_batch.batch_size, self.graph
            graph.lengths[:size], graph.rows[:size] = forward_batch.seq_lens, forward_batch.req_pool_indices
            view = SimpleNamespace(
                batch_size=size,
                forward_mode=forward_batch.forward_mode,
                spec_info=None,
                seq_lens=graph.lengths[:size],
                req_pool_indices=graph.rows[:size],
                kv_loc_plan=forward_batch.kv_loc_plan,
            )
            if size not in graph.captured:
                self.init_forward_metadata_out_graph(view, in_capture=True)
                graph.captured[size] = self.forward_metadata
            self.init_forward_metadata_out_graph(view)
            self.forward_metadata = graph.captured[size]  # what the kernels of a captured graph hold
            self.init_forward_metadata_in_graph(view)

    PackedKVPool.__init__ = init_with_kernels
    backend.create = InterpretedBackend
