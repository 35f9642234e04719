"""A test-only SGLang plugin: LoRA on a machine without a GPU, where SGLang would pin memory and fail."""


def register():
    import torch

    def unpinned(make):
        return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)

    for name in ("tensor", "zeros", "empty"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
