"""README and docs: links lead somewhere, commands and options exist, and the blocks marked as tested run."""

import ast
import itertools
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from cfpo_trl import cli
from cfpo_trl.running.recipe import RecipeParser
from cfpo_trl.studies.plan import STUDY_KEYS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?P<tested><!-- tested -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    return [m["text"] for m in BLOCK.finditer(page.read_text()) if m["language"] in languages]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
        seen[slug] = seen.get(slug, 0) + 1
    return found


@cache
def options() -> set[str]:
    from cfpo_trl import grpo, reward_training

    parsers = [RecipeParser(module.ARGUMENTS) for module in (grpo, reward_training)]
    parsers.append(grpo.recipe_parser(["--rollouts", "async"]))
    return {name for parser in parsers for name in parser.defaults}


@each_page
def test_links_lead_somewhere(page):
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_commands_and_their_options_exist(page):
    shown = "\n".join(blocks(page, "", "sh", "bash")).replace("\\\n", " ")
    inline = "\n".join(re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text())))
    for line in [*shown.splitlines(), *inline.splitlines()]:
        words = re.split(r"\s+", line.partition("#")[0].strip())
        for before, word in itertools.pairwise(words):
            if before == "cfpo" and re.fullmatch(r"[a-z-]+", word):
                assert word in cli.COMMANDS, line
            if before == "make" and re.fullmatch(r"[a-z-]+", word):
                assert word in TARGETS, line
        for word in words:
            if re.fullmatch(r"(src|scripts|recipes|tests)/[\w./-]+\.\w+", word):
                assert (ROOT / word).exists(), line
        if "--config" in words and ("train" in words or "src/cfpo_trl/grpo.py" in words):
            given = [word.partition("=")[0] for word in words[words.index("--config") + 2 :] if word.startswith("--")]
            assert {name.removeprefix("--") for name in given} <= options(), line


@each_page
def test_recipes_shown_have_options_that_exist(page):
    for text in blocks(page, "yaml"):
        shown = yaml.safe_load(text)
        assert shown.keys() <= options() | STUDY_KEYS, text


@each_page
def test_python_shown_is_python(page):
    for text in blocks(page, "python"):
        ast.parse(text)


@pytest.mark.parametrize(
    ("page", "text"),
    [
        pytest.param(page, match["text"], id=f"{page.stem}-{number}")
        for page in PAGES
        for number, match in enumerate(m for m in BLOCK.finditer(page.read_text()) if m["tested"])
    ],
)
def test_blocks_marked_as_tested_run(page, text, tmp_path):
    result = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_every_page_is_on_the_map():
    linked = {(ROOT / link).resolve() for link in LINK.findall((ROOT / "README.md").read_text()) if "://" not in link}
    pages = {page for page in PAGES if page.parent.name == "docs"}
    assert pages <= linked


def test_shell_lines_of_the_readme_parse():
    for text in blocks(ROOT / "README.md", ""):
        if "cfpo " in text:
            assert all(shlex.split(line, comments=True) for line in text.splitlines() if line.strip())
