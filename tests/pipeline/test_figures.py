"""Pictures of attention: the image under each map, heads in order, a scale, and the text of each row."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image
from tiny_runs import IMAGES, TWO_IMAGES, write_cache, write_data

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import DataError
from alignkd.inputs.regions import region, stack
from alignkd.pipeline.cache_admin.row import find_row, recorded_inputs, row_pieces
from alignkd.pipeline.data.row_source import find_source
from alignkd.pipeline.figures.attention import attention_figure, plt, save_figure


@pytest.fixture
def drawn():
    """Draws a sample of some images, heads and rows; figures are freed at the end."""

    def draw(images=1, heads=4, rows=3, pieces=()):
        regions_R8 = stack([region(number, (2, 3)) for number in range(images)])
        attention_HTV = np.random.default_rng(0).random((heads, rows, 6 * images)).astype(np.float32) / 100
        pictures = [np.full((4, 6, 3), 0.25 * (number + 1), np.float32) for number in range(images)]
        return attention_figure(pictures, attention_HTV, regions_R8, "title", pieces), pictures, attention_HTV

    yield draw
    plt.close("all")


def titles(figure):
    return [axes.get_title().split("\n")[0] for axes in figure.axes if axes.get_title()]


@pytest.mark.parametrize("images", [1, 2])
def test_heads_are_in_order_after_the_image_and_the_mean(drawn, images):
    figure, pictures, attention_HTV = drawn(images)
    of_one = ["image", "all 4 heads", "head 0", "head 1", "head 2", "head 3"]
    assert titles(figure)[:-1] == of_one * images
    panels = [axes for axes in figure.axes if axes.get_title().startswith(("image", "all", "head"))]
    for number, picture in enumerate(pictures):
        block = panels[number * 6 : number * 6 + 6]
        np.testing.assert_array_equal(block[0].images[0].get_array(), picture)
        for head, axes in enumerate(block[2:]):
            under, over = axes.images
            np.testing.assert_allclose(under.get_array(), picture.mean(axis=2))
            expected = attention_HTV[head].mean(axis=0)[6 * number : 6 * number + 6].reshape(2, 3)
            np.testing.assert_allclose(over.get_array(), expected, rtol=1e-6)


def test_the_maps_of_an_image_share_the_scale_that_its_colour_bar_shows(drawn):
    figure, _, attention_HTV = drawn()
    (bar,) = [axes for axes in figure.axes if axes.get_ylabel() == "attention to a vision token"]
    scales = {axes.images[1].get_clim() for axes in figure.axes if axes.get_title().startswith(("all", "head"))}
    (scale,) = scales
    assert scale == pytest.approx((0, attention_HTV.mean(axis=1).max()))
    assert bar.get_ylim() == pytest.approx(scale)


def test_each_text_row_has_the_text_of_its_token(drawn):
    pieces = ["Which", "$x^{", "\x1b]0;owned\x07"]
    figure, _, attention_HTV = drawn(pieces=pieces)
    (table,) = [axes for axes in figure.axes if axes.get_title().startswith("text tokens")]
    assert [label.get_text() for label in table.get_yticklabels()] == ["Which", "$x^{", "\\x1b]0;owned\\x07"]
    np.testing.assert_allclose(table.images[0].get_array(), attention_HTV.mean(axis=0), rtol=1e-6)
    figure.canvas.draw()  # a formula that is none would raise here


def test_many_heads_and_rows_are_cut_and_the_figure_says_so(drawn):
    figure, _, _ = drawn(heads=40, rows=200)
    assert sum(title.startswith("head ") for title in titles(figure)) == 34
    assert "all 40 heads" in titles(figure)
    assert any("the first 64 of 200" in title for title in titles(figure))


def test_letters_without_a_glyph_are_drawn_without_a_warning(drawn, tmp_path):
    figure, _, _ = drawn(pieces=["中", "ع", "\U0001f600"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_sample_without_attention_shows_its_images_alone(pictures):
    shown = [np.zeros((4, 4, 3))] * pictures
    figure = attention_figure(shown, np.zeros((2, 0, 0)), np.zeros((0, 8)), "title")
    assert sum(bool(axes.images) for axes in figure.axes) == pictures
    plt.close(figure)


@pytest.fixture
def two(tmp_path):
    """A cache of one sample of two images, its data, and its images in a folder of their own."""
    images = tmp_path / "images"
    images.mkdir()
    for name in TWO_IMAGES["image"]:
        shutil.copy(IMAGES / name, images / name)
    data = write_data(tmp_path / "d.json", [TWO_IMAGES])
    write_cache(data, tmp_path / "cache", images=str(images))
    return tmp_path


def test_a_row_finds_its_images_and_its_text_again(two):
    reader = CacheReader(two / "cache")
    row = find_row(reader, "two5")
    (recorded,) = recorded_inputs(reader)
    assert recorded == (str(two / "d.json"), str(two / "images"))
    source = find_source(*recorded, row.key, row.image_sha256, turned=False)
    for picture, name in zip(source.pictures, TWO_IMAGES["image"], strict=True):
        with Image.open(IMAGES / name) as image:
            np.testing.assert_array_equal(picture, np.asarray(image.convert("RGB"), np.float32) / 255)
    pieces = row_pieces(reader, row, source.text)
    assert len(pieces) == row.values["attention"].shape[1]
    said = "".join(piece for piece in pieces if not piece.startswith("id "))
    assert said == "Whichiswide?Thesecondone."
    assert all(piece.startswith("id ") for piece in row_pieces(reader, row, None))


@pytest.mark.slow
def test_an_image_that_has_changed_is_not_drawn_as_the_one_of_the_row(two, door):
    shutil.copy(IMAGES / "1.png", two / "images" / TWO_IMAGES["image"][0])
    row = find_row(CacheReader(two / "cache"), "two5")
    with pytest.raises(DataError, match="are not those that its row was made from"):
        find_source(str(two / "d.json"), str(two / "images"), row.key, row.image_sha256, turned=False)
    words = ["cache", "inspect", two / "cache", "--id", "two5", "--plot", two / "a.png"]
    plain = door(*words)
    assert plain.code == 0, plain.stderr
    assert "warning: the image and the text are not drawn" in plain.stderr
    refused = door(*words, "--images", two / "images")
    assert refused.code == 2
    assert "are not those" in refused.stderr
    given = door(*words, "--images", IMAGES)
    assert (given.code, given.stderr) == (0, "")


def test_a_data_file_without_the_sample_is_refused_by_name(two):
    other = write_data(two / "other.json", [{**TWO_IMAGES, "id": "other"}])
    row = find_row(CacheReader(two / "cache"), "two5")
    with pytest.raises(DataError, match="does not hold the sample of this row"):
        find_source(str(other), str(two / "images"), row.key, row.image_sha256, turned=False)


@pytest.mark.slow
def test_inspecting_with_a_picture_loads_no_torch(two):
    import subprocess
    import sys

    words = ["cache", "inspect", str(two / "cache"), "--id", "two5", "--plot", str(two / "a.png"), "--json"]
    code = f"import sys; from alignkd.cli import main; main({words!r}, standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert json.loads(lines[0])["id"] == "two5"
    assert lines[-1] == "False"
