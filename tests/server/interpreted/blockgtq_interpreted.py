"""A test-only SGLang plugin: the CUDA backend on the CPU, its kernels in Triton's interpreter.

Decode steps go the way of a CUDA graph: metadata over the graph's buffers once for each batch size, and from then on
only what a graph would run, over buffers that hold the requests of the step. Prefill attention is SGLang's Triton
kernel.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

MOST = 8  # requests of a decode batch
CHUNK = 64  # most tokens of a prefill beside a window


def _swift():
    """The interpreter without what it does in vain, as the kernels' tests have it."""
    from triton.runtime import interpreter

    file = Path(__file__).parents[2] / "kernels" / "conftest.py"
    spec = importlib.util.spec_from_file_location("kernels_conftest", file)
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    interpreter._patch_lang = conftest._PatchedOnce()
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter.GridExecutor._restore_args_dev = lambda *_: None


def register():
    import torch

    from sglang_blockgtq import backend, runtime
    from sglang_blockgtq.backend.buffers import Buffers, new_graph_slots
    from sglang_blockgtq.backend.cuda import TritonPackedBackend
    from sglang_blockgtq.backend.extend import Workspace
    from sglang_blockgtq.backend.prefill import Prefill, triton_attention
    from sglang_blockgtq.kernels.decode.attention import DecodeScratch
    from sglang_blockgtq.kernels.layer import TritonLayer
    from sglang_blockgtq.speculation import Verification

    def layers_of(table, heads, layer_ids, device, positions):
        return {i: TritonLayer(table.layer_codec(i, heads), device, table.k_templates, positions) for i in layer_ids}

    class InterpretedBackend(TritonPackedBackend):
        graph = None

        def _buffers(self, runner):
            layer, context = self.pool.layer(self.first_layer), runner.model_config.context_len
            # Without a window one prompt goes in pieces; with one it lies there with a chunk.
            window = (runner.sliding_window_size or -1) + 1
            verification = Verification.of(runner, MOST)
            ahead = verification.q_len if verification else 0
            return Buffers(
                prefill=Prefill(triton_attention, "SGLang's Triton kernel"),
                decode_attention="Triton",
                workspace=Workspace(layer, triton_attention, runner.dtype, "cpu", 40, least=window and window + CHUNK),
                scratch=DecodeScratch.of(layer.tables, MOST, self.num_head),
                graph_slots=new_graph_slots(MOST * (context + ahead), "cpu"),
                verification=verification,
                verify_scratch=DecodeScratch.of(layer.tables, MOST, self.num_head, ahead) if ahead else None,
            )

        def _warm_up(self, runner):
            self.rope = self._checked_rope(runner)
            print("interpreted: RoPE by", "attention" if self.rope else "the model", flush=True)

        def init_forward_metadata(self, forward_batch):
            mode = forward_batch.forward_mode
            if not mode.is_decode() and not mode.is_target_verify():
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
                forward_mode=mode,
                spec_info=forward_batch.spec_info,
                seq_lens=graph.lengths[:size],
                positions=forward_batch.positions,
                req_pool_indices=graph.rows[:size],
                kv_loc_plan=forward_batch.kv_loc_plan,
            )
            if (mode, size) not in graph.captured:
                self.init_forward_metadata_out_graph(view, in_capture=True)
                graph.captured[mode, size] = self.forward_metadata
            self.init_forward_metadata_out_graph(view)
            self.forward_metadata = graph.captured[mode, size]  # what the kernels of a captured graph hold
            self.init_forward_metadata_in_graph(view)

    _swift()
    runtime.layers_of = layers_of
    backend.create = InterpretedBackend
