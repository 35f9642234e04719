"""What a server costs before its first request: time to start and its parts, memory by what it is for.

``memory_rest`` is what remains of the server's GPU memory without weights, cache, graphs and SGLang's table of
requests: CUDA itself, workspaces and tables. The plugin's own share is its difference from the unquantized server's.
"""

from __future__ import annotations

from ...server_steps import phases
from ..counters import GB, pool_bytes, request_table, state
from . import Context, Outcomes, Plan, Value

NAME = "cost"
CASE = "start"


def cases(plan: Plan) -> list[str]:
    return [CASE]


def measure(ctx: Context, cases: list[str]) -> Outcomes:
    values = [Value("start", ctx.server.start_s or 0.0, "s")]
    values += [Value(f"start_{name}", seconds, "s") for name, seconds in phases(ctx.server.output()).items()]
    if packed := ctx.info.get("kv_quant"):
        values.append(Value("table", packed["table_seconds"], "s", packed["table_origin"]))
    use = state(ctx.info).get("memory_usage", {})
    graphs = sum((use.get("graph") or {}).values()) * GB
    if use:
        values += [Value("memory_weights", use["weight"] * GB, "bytes"), Value("memory_graphs", graphs, "bytes")]
    if table := request_table(ctx.info):
        values.append(Value("memory_requests", table[0], "bytes", "which token of which request lies where"))
    if ctx.held is not None and use and table and (pool := pool_bytes(ctx.info)):
        rest = ctx.held - use["weight"] * GB - graphs - pool - table[0]
        values.append(Value("memory_rest", rest, "bytes", ctx.held_by))
    yield CASE, values
