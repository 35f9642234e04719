"""A test-only SGLang plugin: --kv-quant-check-rows on a GPU, where it is refused, with what tells why a server stalls.

Every process writes all its threads' stacks to the server's log twice a minute.
"""

import faulthandler

EVERY = 30  # seconds


def register():
    from sglang_blockgtq import plugin

    plugin.check_checksums = lambda *_: None
    faulthandler.dump_traceback_later(EVERY, repeat=True)
