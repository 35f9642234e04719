"""A test-only SGLang plugin: HiCache on a machine without a GPU. What SGLang's transfer kernels do there is done here,
byte by byte at the addresses that they would be given, and no memory is pinned. With a GPU it changes nothing.
"""

from ctypes import memmove


def _rows(source, target, source_slots, target_slots, size, source_stride=0, target_stride=0):
    """``size`` bytes of each slot, between base addresses; a stride of 0 is ``size``."""
    for a, b in zip(source_slots.tolist(), target_slots.tolist(), strict=True):
        memmove(target + b * (target_stride or size), source + a * (source_stride or size), size)


def transfer_kv_per_layer_mla(src, dst, src_indices, dst_indices, item_size):
    _rows(src.data_ptr(), dst.data_ptr(), src_indices, dst_indices, item_size)


def transfer_kv_per_layer_mla_pf_lf(src, dst, src_indices, dst_indices, layer_id, item_size, src_layout_dim):
    source = src.data_ptr() + layer_id * item_size
    _rows(source, dst.data_ptr(), src_indices, dst_indices, item_size, source_stride=src_layout_dim)


def transfer_kv_all_layer_mla(src_layers, dst_layers, src_indices, dst_indices, item_size, num_layers):
    assert len(src_layers) == len(dst_layers) == num_layers
    for source, target in zip(src_layers.tolist(), dst_layers.tolist(), strict=True):
        _rows(source, target, src_indices, dst_indices, item_size)


def transfer_kv_all_layer_mla_lf_pf(
    src_layers, dst, src_indices, dst_indices, item_size, dst_layout_dim, num_layers
):  # fmt: skip
    assert len(src_layers) == num_layers
    for layer, source in enumerate(src_layers.tolist()):
        target = dst.data_ptr() + layer * item_size
        _rows(source, target, src_indices, dst_indices, item_size, target_stride=dst_layout_dim)


def transfer_kv_per_layer_pf_lf(src_k, dst_k, src_v, dst_v, *args, **kwargs):
    transfer_kv_per_layer_mla_pf_lf(src_k, dst_k, *args, **kwargs)
    transfer_kv_per_layer_mla_pf_lf(src_v, dst_v, *args, **kwargs)


def transfer_kv_all_layer_lf_pf(src_k_layers, dst_k, src_v_layers, dst_v, *args, **kwargs):
    transfer_kv_all_layer_mla_lf_pf(src_k_layers, dst_k, *args, **kwargs)
    transfer_kv_all_layer_mla_lf_pf(src_v_layers, dst_v, *args, **kwargs)


def transfer_kv_mamba_lf_pf(src_ptrs, *args, **kwargs):
    transfer_kv_all_layer_mla_lf_pf(src_ptrs, *args, **kwargs)


transfer_kv_mamba_pf_lf = transfer_kv_per_layer_mla_pf_lf


def transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, page_size):
    for source, target in zip(src_layers, dst_layers, strict=True):
        _rows(source.data_ptr(), target.data_ptr(), src_indices, dst_indices, source[0].nbytes)


def _pages(buffers, indices, page_size, layers, layer):
    """Addresses of an index's page in one layer, where all layers of a page lie together."""
    base, size = buffers.data_ptr(), buffers[0, 0].nbytes
    return [base + (first // page_size * layers + layer) * size for first in indices[::page_size].tolist()]


def transfer_kv_per_layer_direct_pf_lf(src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size):
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        sources = _pages(src, src_indices, page_size, src.shape[1], layer_id)
        for source, slot in zip(sources, dst_indices[::page_size].tolist(), strict=True):
            memmove(dst[slot].data_ptr(), source, src[0, 0].nbytes)


def transfer_kv_all_layer_direct_lf_pf(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size):
    (dst,) = dst_ptrs
    for layer, src in enumerate(src_ptrs):
        targets = _pages(dst, dst_indices, page_size, len(src_ptrs), layer)
        for target, slot in zip(targets, src_indices[::page_size].tolist(), strict=True):
            memmove(target, src[slot].data_ptr(), dst[0, 0].nbytes)


def lend_kernels(put=setattr):
    """To the modules of the host pools, which import them where there is a GPU. put: as ``setattr``."""
    from sglang.srt.mem_cache.pool_host import mamba, mha, mla

    for module in (mamba, mha, mla):
        put(module, "_is_cuda", False)
        for name, function in globals().items():
            if name.startswith("transfer_kv_"):
                put(module, name, function)


def register():
    import torch

    if torch.cuda.is_available():
        return
    from sglang.srt.mem_cache.pool_host import base, common

    from sglang_blockgtq import conflicts

    conflicts.HICACHE_DEVICES = ("cuda", "cpu")
    common._cuda_host_register = lambda *args: None
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0  # SGLang leaves 10 GiB to others
    lend_kernels()
