"""docs/format.md says what the code does: generated parts are current, and its rules alone decode a row."""

import importlib.util
import re
import struct
from pathlib import Path

import pytest
import torch

from sglang_blockgtq.calibrate.allocate import ALLOCATORS, template_candidates
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.kernels import naive
from sglang_blockgtq.kernels.codebook import lloyd_max
from sglang_blockgtq.kernels.layout import CodeLayout
from sglang_blockgtq.kernels.pack import pack

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "format.md"


def load(name):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


format_table = load("format_table")


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny operations: waiting for a second thread costs more than it helps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_generated_blocks_are_current():
    assert format_table.rewrite(DOC.read_text()) == DOC.read_text(), "run python scripts/format_table.py"


def test_missing_marker_is_an_error():
    with pytest.raises(ValueError, match="end sizes"):
        format_table.rewrite(DOC.read_text().replace("<!-- end sizes -->", ""))


#: The page's rules, written out once more without the project's layout code: code bits -> fields
#: (plane, position in the code), and the planes' widths in storage order.
FIELDS = {2: [("two", 0)], 3: [("two", 1), ("one", 0)], 6: [("hi", 2), ("two", 0)]}
PLANES = [("hi", 4), ("two", 2), ("one", 1)]


def decode_by_hand(data, widths):
    """Codes of one head from its bytes; every plane of the example fills whole bytes."""
    codes, offset = [0] * len(widths), 0
    for name, width in PLANES:
        members = [(c, dict(FIELDS[b])[name]) for c, b in enumerate(widths) if name in dict(FIELDS[b])]
        size = len(members) * width // 8
        for e, (channel, position) in enumerate(members):
            field = data[offset + e % size] >> (e // size * width) & ((1 << width) - 1)
            codes[channel] |= field << position
        offset += size
    assert offset == len(data)
    return codes


def test_example_row_decodes_by_the_rules_of_the_page():
    text = DOC.read_text()
    lines = re.findall(r"^ *\d+  ((?:[0-9a-f]{2} ?)+)$", text, re.M)
    row = bytes.fromhex(" ".join(lines))
    assert len(row) == 200
    widths = [6] * 16 + [3] * 64 + [2] * 48
    codec, packed = format_table.example_row()
    want_k, want_v = naive.decode_transformed(codec, packed[None])
    for head in range(2):
        k_scale, v_scale = struct.unpack_from("<ee", row, 192 + head * 4)
        k = decode_by_hand(row[head * 48 : head * 48 + 48], widths)
        v = decode_by_hand(row[96 + head * 48 : 96 + head * 48 + 48], [3] * 128)
        k = torch.tensor([k_scale * lloyd_max(b)[c] for b, c in zip(widths, k, strict=True)])
        v = torch.tensor([v_scale * lloyd_max(3)[c] for c in v])
        torch.testing.assert_close(k, want_k[0, head].double(), rtol=1e-6, atol=0, check_dtype=False)
        torch.testing.assert_close(v, want_v[0, head].double(), rtol=1e-6, atol=0, check_dtype=False)
        if head == 1:
            assert f"**{k[70]:.5f}**" in text
    assert (37 * 70 + 11) % 64 / 16 - 31.5 / 16 == 0.59375


def test_tail_example():
    layout = CodeLayout((3,) * 10)
    assert layout.code_bytes == 4 and layout.tail_offset == 3
    assert [(p.name, p.num_bytes, p.num_planar) for p in layout.planes] == [("two", 2, 8), ("one", 1, 8)]
    for channel, bits in ((8, (0, 1, 4)), (9, (2, 3, 5))):
        codes = torch.zeros(10, dtype=torch.int32)
        codes[channel] = 7
        tail = int(pack(layout, codes)[3])
        assert tail == sum(1 << b for b in bits)


def table_rows():
    found = re.findall(
        r"^\| (\d+) \| K(\d)V(\d) \| (\d+) \| (\d+) \| [\d.]+ \| (\d+) to (\d+) \|$", DOC.read_text(), re.M
    )
    return [tuple(map(int, row)) for row in found]


def test_table_is_complete_and_within_the_promised_bytes():
    rows = table_rows()
    assert len(rows) == 20
    at_128 = {(k, v): size for dim, k, v, _, size, *_ in rows if dim == 128}
    assert all(at_128[bits] <= most for bits, most in {(2, 2): 72, (3, 2): 88, (3, 3): 104, (4, 4): 136}.items())


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_table_holds_for_real_allocations(dim):
    """Every allocator, on heads whose block energies span five decades."""
    generator = torch.Generator().manual_seed(dim)
    energy = 10 ** (5 * torch.rand(2, 1, 3, dim // 2, generator=generator, dtype=torch.float64) - 3)
    moments = Moments(energy[0], energy[1], torch.ones(1, 3, dtype=torch.float64), 2048)
    for _, k_bits, v_bits, dense, fixed, least, most in (row for row in table_rows() if row[0] == dim):
        assert dense == 4 * dim
        for name in ALLOCATORS:
            table = build_table(moments, [RopeBlocks(dim, dim)], k_bits=k_bits, v_bits=v_bits, allocator=name)
            size = table.row_layout(0).head_bytes
            if name in ("uniform", "template"):
                assert size == fixed
            else:
                assert least < size <= most


def test_example_widths_are_a_template():
    units = tuple(format_table.EXAMPLE_WIDTHS[::16])
    assert units in template_candidates(24)


def test_picture_can_be_drawn(tmp_path):
    draw_row = load("draw_row")
    draw_row.draw(tmp_path / "row.png")
    header = (tmp_path / "row.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert header == (ROOT / "docs" / "img" / "row.png").read_bytes()[:24], "run python scripts/draw_row.py"


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_readme_results_are_current():
    """The README's figures come from the result files, by the script."""
    results = load("results_table")
    text = (ROOT / "README.md").read_text()
    assert results.updated(text) == text
    assert "| **K3V3** (default) | 52 |" in text
