"""What `--stream` writes, piece by piece."""

from __future__ import annotations

from pdllm_jax.cli.commands import Stream, before_stop


class Spelling:
    """A tokenizer of bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 255).decode(errors="replace")


def test_a_stream_writes_whole_characters_and_what_has_changed(capsys):
    stream = Stream()
    stream.tokenizer = Spelling()
    seen = []
    for piece in ([65, 0xC3], [0xA4, 66], [67]):
        stream(0, len(seen), piece)
        seen.append(capsys.readouterr().out)
    assert seen == ["A", "\u00e4B", "C"]
    stream.finish("A\u00e4BC and more")
    assert capsys.readouterr().out == " and more\n"
    stream.finish("A\u00e4XC")
    assert capsys.readouterr().out == "\nA\u00e4XC\n"
    bare = Stream()
    bare(0, 0, [3, 4])
    bare(0, 1, [5])
    bare.finish("3 4 5 6")
    assert capsys.readouterr().out == "3 4 5 6\n"


def test_a_stream_holds_back_what_may_begin_a_stop(capsys):
    stream = Stream(["BCD", "CX"])
    stream.tokenizer = Spelling()
    seen = []
    for piece in (b"AB", b"C", b"E", b"BC", b"DA"):
        stream(0, len(seen), list(piece))
        seen.append(capsys.readouterr().out)
    assert seen == ["A", "", "BCE", "", ""]
    stream.finish(before_stop("ABCEBCDA", stream.stops))
    assert capsys.readouterr().out == "\n"
