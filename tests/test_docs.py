"""The pages say what the code and the records do: generated parts are current, messages and options exist, and the
rules of docs/format.md alone decode a row."""

import ast
import importlib.util
import re
import struct
from functools import cache
from pathlib import Path

import pytest
import torch

from sglang_blockgtq.calibrate.allocate import ALLOCATORS, template_candidates
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.segments import SEGMENT_ALLOCATORS
from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.format.codebook import levels
from sglang_blockgtq.kernels.format.layout import CodeLayout, gather_rows
from sglang_blockgtq.kernels.format.pack import pack

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "format.md"
EXAMPLE = ROOT / "docs" / "format_example.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/notes/*.md")]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


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
    for page in format_table.BLOCKS:
        assert format_table.rewrite(page, page.read_text()) == page.read_text(), "run python scripts/format_table.py"


def test_missing_marker_is_an_error():
    with pytest.raises(ValueError, match="end sizes"):
        format_table.rewrite(DOC, DOC.read_text().replace("<!-- end sizes -->", ""))


def table_after(marker, text, columns):
    """Rows of the generated table behind a marker, as lists of cells."""
    block = text.split(f"<!-- {marker}: generated")[1].split(f"<!-- end {marker} -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line[:1] == "|"]
    assert all(len(row) == columns for row in rows)
    return rows[2:]


def span(cell):
    """(first, number) of "bits 5-3", "bit 2" or "0-31"."""
    numbers = sorted(int(x) for x in re.findall(r"\d+", cell))
    return numbers[0], numbers[-1] - numbers[0] + 1


def decode_by_hand(data, text, side):
    """Codes of one head from its bytes by the page's rules and tables, without the project's layout code."""
    bins = [(int(bits), span(where)) for _, bits, where, _, _ in table_after("bins", text, 5)]
    codes = [0] * 128
    for which, _, channels, width, number, part, code in table_after("columns", text, 7):
        if which != side:
            continue
        bits, (offset, size) = bins[int(number)]
        assert size == 2 * bits
        shift, piece = span(part.removeprefix("bits ").removeprefix("bit "))
        position = 0 if code == "all" else span(code)[0]
        assert code != "all" or piece == int(width)
        first, count = span(channels)
        assert count == 16
        for column in range(16):
            (word,) = struct.unpack_from("<H", data, offset + 2 * (column % bits))
            field = word >> (column // bits * bits + shift) & ((1 << piece) - 1)
            codes[first + column] |= field << position
    return codes


def test_example_row_decodes_by_the_rules_of_the_page():
    text = f"{DOC.read_text()}\n{EXAMPLE.read_text()}"
    lines = re.findall(r"^ *\d+  ((?:[0-9a-f]{2} ?)+)$", text, re.M)
    row = bytes.fromhex(" ".join(lines))
    assert len(row) == 200
    widths = [bits for bits in (6, 4, 3, 3, 2, 2, 2, 2) for _ in range(16)]
    codec, packed = format_table.example_row()
    want_k, want_v = reference.decode_transformed(codec, packed[None])
    for head in range(2):
        k_scale, v_scale = struct.unpack_from("<ee", row, 192 + head * 4)
        k = decode_by_hand(row[head * 48 : head * 48 + 48], text, "K")
        v = decode_by_hand(row[96 + head * 48 : 96 + head * 48 + 48], text, "V")
        k = torch.tensor([k_scale * levels_of_the_page(text, b)[c] for b, c in zip(widths, k, strict=True)])
        v = torch.tensor([v_scale * levels_of_the_page(text, 3)[c] for c in v])
        torch.testing.assert_close(k, want_k[0, head].double(), rtol=1e-5, atol=0, check_dtype=False)
        torch.testing.assert_close(v, want_v[0, head].double(), rtol=1e-5, atol=0, check_dtype=False)
    assert f"**{k[90]:.5f}**" in text and f"**{v[123]:.5f}**" in text
    original = ((37 * 90 + 11) % 64 - 31.5) / 16, ((29 * 123 + 5) % 64 - 31.5) / 32
    assert "were {} and {} before packing".format(*original) in " ".join(text.split())


def levels_of_the_page(text, bits):
    """Levels of a code from the page's coefficients."""
    row = next(row for row in table_after("codebooks", text, 4) if int(row[0]) == bits)
    coefficients = [float(c) for c in row[1].split(",")]
    steps = [-1 + 2 * i / ((1 << bits) - 1) for i in range(1 << bits)]
    return torch.tensor([sum(c * x ** (2 * i + 1) for i, c in enumerate(coefficients)) for x in steps]).double()


def test_codebooks_of_the_page():
    text = DOC.read_text()
    for bits in range(1, 9):
        torch.testing.assert_close(levels_of_the_page(text, bits), levels(bits), rtol=1e-5, atol=1e-7)


def test_interleaving_by_the_rules_of_the_page():
    """Rows laid out by the table of sections alone, read by the project."""
    layout = format_table.row_layout(2, format_table.EXAMPLE_WIDTHS, 3)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (32, 200), dtype=torch.uint8, generator=generator)
    storage = bytearray(32 * 200)
    for _, where, each, in_block in table_after("sections", DOC.read_text(), 4):
        (first, size), (start, room) = span(where), span(in_block)
        assert size == int(each) and room == 16 * size and start == 16 * first
        for n in range(32):
            at = n // 16 * 16 * 200 + first * 16 + n % 16 * size
            storage[at : at + size] = bytes(rows[n, first : first + size].tolist())
    held = torch.tensor(list(storage), dtype=torch.uint8).view(32, 200)
    assert torch.equal(gather_rows(layout, held, torch.arange(32)), rows)


def test_string_of_bits_by_the_rules_of_the_page():
    words = " ".join(DOC.read_text().split())
    assert "Channels of 3, 3 and 2 bits share one byte: bits 0-2, 3-5 and 6-7." in words
    assert pack(CodeLayout((3, 3, 2)), torch.tensor([5, 3, 2]), False).tolist() == [5 | 3 << 3 | 2 << 6]
    widths = (8, 7, 5, 5, 3, 1, 1)
    codes = [200, 99, 30, 1, 6, 0, 1]
    string = sum(code << sum(widths[:c]) for c, code in enumerate(codes))
    assert bytes(pack(CodeLayout(widths), torch.tensor(codes), False).tolist()) == string.to_bytes(4, "little")


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
    """Every allocator, on heads whose block energies span five decades; paper and product by blocks."""
    generator = torch.Generator().manual_seed(dim)
    energy = 10 ** (5 * torch.rand(2, 1, 3, dim // 2, generator=generator, dtype=torch.float64) - 3)
    moments = Moments(energy[0], energy[1], torch.ones(1, 3, dtype=torch.float64), 2048)
    for _, k_bits, v_bits, dense, fixed, least, most in (row for row in table_rows() if row[0] == dim):
        assert dense == 4 * dim
        for name in ALLOCATORS:
            granularity = "block" if name in SEGMENT_ALLOCATORS else "segment"
            options = {"k_bits": k_bits, "v_bits": v_bits, "allocator": name, "granularity": granularity}
            table = build_table(moments, [RopeBlocks(dim, dim)], **options)
            size = table.row_layout(0).head_bytes
            if name in ("uniform", "template"):
                assert size == fixed
            else:
                assert least < size <= most


def test_example_widths_are_a_template():
    units = tuple(format_table.EXAMPLE_WIDTHS[::16])
    assert units in template_candidates(24)


@pytest.mark.parametrize("name", ["row", "quality", "peers", "speed"])
def test_picture_can_be_drawn(tmp_path, name):
    if name == "row":
        load("draw_row").draw(tmp_path / "row.png")
    else:
        getattr(load("draw_figures"), f"draw_{name}")(tmp_path / f"{name}.png")
    header = (tmp_path / f"{name}.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert header == (ROOT / "docs" / "img" / f"{name}.png").read_bytes()[:24], (
        "run scripts/draw_row.py, draw_figures.py"
    )


def test_figures_are_those_of_the_records():
    figures = load("draw_figures")
    assert {"template", "kivi", "uniform-haar", "fp8_e4m3"} <= figures.quality().keys()
    assert all(len(points) == (1 if method == "fp8_e4m3" else 3) for method, points in figures.quality().items())
    assert figures.quality()["template"][1][0] == 52
    assert [tokens for tokens, _ in figures.steps()["K3V3"]] == [2**n for n in (12, 14, 16, 17, 18, 19)]
    assert figures.layer().keys() == {"bf16", "fp8", "K3V3", "K2V2"}


@each_page
def test_links_lead_somewhere(page):
    """To a file, and to a heading of a page."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if "://" in target:
            continue
        to = page.parent / target if target else page
        assert to.exists(), f"{target} is not there"
        if anchor:
            assert anchor in headings(to), f"{target} has no heading #{anchor}"


@cache
def headings(page):
    """Anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_lines_and_pages_are_short(page):
    """100 columns, but for tables, pictures, generated lines and code; 250 lines, but for notes; README 130."""
    if page.name.startswith("quality_"):
        return  # written by make quality
    text = page.read_text()
    prose = re.sub(r"^```.*?^```$|^<!-- .*?generated.*?^<!-- end .*?-->$", "", text, flags=re.M | re.S)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)  # where a link leads does not count
    assert not [x for x in prose.splitlines() if len(x) > 100 and x.lstrip()[:1] not in ("|", "!", "<")]
    most = 130 if page.name == "README.md" else 250
    assert page.parent.name == "notes" or len(text.splitlines()) <= most


@pytest.mark.parametrize("page", ["README.md", "docs/fidelity.md", "docs/performance.md", "docs/notes/serving.md"])
def test_tables_are_those_of_the_records(page):
    results = load("results_table")
    assert page in results.PAGES
    text = (ROOT / page).read_text()
    assert results.updated(page, text) == text, "run python scripts/results_table.py"


def test_readme_has_figures_of_one_card_a_table():
    results = load("results_table")
    tables = results.gains().split("\n\n")
    assert len({table.splitlines()[0].split("|")[1] for table in tables}) == len(tables)
    assert "| **K3V3** (`balanced`) | 100 | 52 |" in (ROOT / "README.md").read_text()


def test_readme_has_no_figure_but_those_of_the_script():
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"^<!-- .*?generated.*?^<!-- end .*?-->$", "", text, flags=re.M | re.S)
    assert not re.findall(r"\d[\d.,]*(?:x\b| ?%| times| ms\b| us\b| tokens/s| seconds)", prose)


def test_a_stale_page_is_told(tmp_path, monkeypatch, capsys):
    results = load("results_table")
    for page in results.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        stale = (ROOT / page).read_text().replace("| **K3V3** (`balanced`) | 100 |", "| K3V3 | 1 |")
        (tmp_path / page).write_text(stale)
    monkeypatch.setattr("sys.argv", ["results_table.py", "--check"])
    assert results.main(tmp_path) == 1
    err = capsys.readouterr().err
    assert "README.md is not what the records say" in err and "docs/performance.md" not in err
    monkeypatch.setattr("sys.argv", ["results_table.py"])
    assert results.main(tmp_path) == 0
    assert all((tmp_path / page).read_text() == (ROOT / page).read_text() for page in results.PAGES)


def test_a_page_without_a_place_is_an_error():
    results = load("results_table")
    with pytest.raises(ValueError, match="no place for the table gains"):
        results.updated("README.md", (ROOT / "README.md").read_text().replace("<!-- end gains -->", ""))


def test_messages_of_the_manual_are_those_of_the_code():
    """Each message that docs/using.md explains: its parts between ``...`` stand in the code."""
    text = (ROOT / "docs" / "using.md").read_text()
    table = text.partition("| message | what it means")[2].partition("\n\n")[0]
    messages = [m for row in table.splitlines()[2:] for m in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(messages) > 20
    said = "\0".join(literals())
    theirs = ("unrecognized arguments", "Received sigquit")  # argparse's and SGLang's
    ours = [m for m in messages if not m.startswith(theirs)]
    missing = [part for m in ours for part in re.split(r"\s*\.\.\.\s*", m) if part.strip() and part not in said]
    assert not missing


def literals():
    """Every string of the package, those of an f-string with its values as blanks between them; values that are known
    before a server starts stand in it."""
    known = {"NAME": "blockgtq"}
    for folder in ("sglang_blockgtq", "calibrate", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    parts = (
                        value.value if isinstance(value, ast.Constant) else known.get(ast.unparse(value.value), " ")
                        for value in node.values
                    )
                    yield "".join(map(str, parts))


def test_gauges_of_the_manual_are_those_of_the_code():
    text = (ROOT / "docs" / "using.md").read_text()
    told = set(re.findall(r"`sglang:kv_quant_(\w+)`", text))
    code = (ROOT / "sglang_blockgtq" / "observability.py").read_text()
    made = set(re.findall(r'^ +"(\w+)": \(', code, re.M)) | {"info"}
    assert told == made


def test_bits_of_the_pages_are_those_of_the_options():
    """The ladder of ``auto``, its target, and the presets."""
    from sglang_blockgtq.options import DEFAULT_RANGE, LADDER, PRESETS, TARGET_KL

    using, readme = (" ".join((ROOT / page).read_text().split()) for page in ("docs/using.md", "README.md"))
    low, high = DEFAULT_RANGE
    every = [f"K{k:g}V{v:g}" for k, v in LADDER]
    default = [f"K{k:g}V{v:g}" for k, v in LADDER if low <= min(k, v) and max(k, v) <= high]
    assert f"The ladder is {', '.join(every)}; by default it begins at {default[0]}." in using
    assert f"the first of {', '.join(default[:-1])} and {default[-1]} whose" in readme
    assert f"is at most {TARGET_KL:g}" in using and f"is at most {TARGET_KL:g}" in readme
    for name, bits in PRESETS.items():
        assert f"`{name}`" in using and (name == "auto" or f"`{name}` (K{bits['k_bits']}V{bits['v_bits']})" in using)


def test_options_of_the_pages_exist():
    from sglang_blockgtq.options import FLAGS

    flags = {"--" + name.replace("_", "-") for name in FLAGS}
    for page in PAGES:
        told = set(re.findall(r"--kv-quant[a-z-]*", page.read_text())) - {"--kv-quant-"}
        assert told <= flags, page.name
    using = (ROOT / "docs" / "using.md").read_text()
    assert all(f"`{flag}" in using for flag in flags), "docs/using.md tells every option"
