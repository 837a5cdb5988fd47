"""The terminal chat keeps the conversation right through commands, interruptions and errors."""

import dataclasses
import json
from typing import Any

import pytest

from easylm_jax.chat import HELP, Chat, talk
from easylm_jax.text.jinja_template import JinjaTemplate
from easylm_jax.text.template import ChatTemplate, find_template, render
from easylm_jax.text.tokenizer import ByteTokenizer


@dataclasses.dataclass
class Parrot:
    """In place of a LanguageModel: repeats the last message in two pieces."""

    template: ChatTemplate
    asked: list[Any] = dataclasses.field(default_factory=list)
    prompts: list[str] = dataclasses.field(default_factory=list)
    interrupt_after: int = 2  # pieces

    def chat(self, messages, *, on_text, seed, quality, **options):
        if len(messages) > 6:
            raise ValueError("70 tokens do not fit")
        segments = render(self.template, messages, generate=True, quality=quality)
        self.asked.append((messages, seed, options))
        self.prompts.append("".join(s.text for s in segments if not s.special))
        pieces = [" You said ", messages[-1]["content"]]
        for number, piece in enumerate([*pieces, "."]):
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            on_text(piece)


@pytest.fixture(autouse=True)
def plain_types(monkeypatch):
    # The type checks of the tests ask for a real LanguageModel.
    monkeypatch.setattr(Chat, "__init__", getattr(Chat.__init__, "__wrapped__", Chat.__init__))


def _talk(lines, *, template="chatml", system="", interrupt_after=9):
    lm = Parrot(find_template(template), interrupt_after=interrupt_after)
    chat = Chat(lm, system=system, seed=5, temperature=0.5)
    written, told, lines = [], [], iter(lines)

    def read():
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    talk(chat, read, written.append, told.append)
    return chat, lm, "".join(written), told


def _said(chat):
    return [(m["role"], m["content"]) for m in chat.messages]


def test_a_conversation_is_asked_whole_and_streamed():
    chat, lm, written, told = _talk(["one", "", "  two "], system="Be kind.")
    assert written == " You said one.\n You said two.\n" and told == []
    assert _said(chat) == [
        ("system", "Be kind."),
        ("user", "one"),
        ("assistant", "You said one."),
        ("user", "two"),
        ("assistant", "You said two."),
    ]
    (first, seed, options), (second, other_seed, _) = lm.asked
    assert len(first) == 2 and len(second) == 4 and options == {"temperature": 0.5}
    assert seed != other_seed


def test_commands(tmp_path):
    file = tmp_path / "chat.json"
    lines = ["/help", "one", f"/save {file}", "/system New.", "/reset", "/nonsense", "/save"]
    chat, _, _, told = _talk([*lines, "/system", "/exit", "never read"], system="Old.")
    assert told[0] == HELP and told[1] == f"3 messages written to {file}"
    assert told[4].startswith("error: there is no command /nonsense")
    assert told[5].startswith("error: /save needs")
    assert chat.messages == []
    saved = json.loads(file.read_text())
    assert saved["template"] == "chatml"
    assert [m["content"] for m in saved["messages"]] == ["Old.", "one", "You said one."]


def test_save_replaces_only_what_this_conversation_wrote(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("precious")
    _, _, _, told = _talk([f"/save {old}", f"/save {new}", "one", f"/save {new}"])
    assert told[0] == f"error: {old} is there already: /save under another name"
    assert old.read_text() == "precious"
    assert told[1:] == [f"0 messages written to {new}", f"2 messages written to {new}"]


def test_a_file_that_cannot_be_written_is_told():
    _, _, written, told = _talk(["/save /nowhere/at/all", "one"])
    assert "No such file" in told[0] and written == " You said one.\n"


def test_reset_keeps_the_system_message():
    chat, *_ = _talk(["one", "/reset"], system="Old.")
    assert _said(chat) == [("system", "Old.")]


def test_an_interrupted_answer_counts_as_far_as_it_went():
    chat, _, written, _ = _talk(["one", KeyboardInterrupt], interrupt_after=1)
    assert _said(chat) == [("user", "one"), ("assistant", "You said")]
    assert written == " You said \n"
    chat, *_ = _talk(["one"], interrupt_after=0)
    assert chat.messages == []


def test_ctrl_c_at_the_prompt_does_not_end():
    chat, _, _, told = _talk([KeyboardInterrupt, "one"])
    assert "Ctrl-D" in told[0] and len(chat.messages) == 2


def test_a_conversation_that_is_too_long_goes_on_after_reset():
    chat, _, written, told = _talk(["1", "2", "3", "4", "/reset", "5"])
    assert told[0] == "error: 70 tokens do not fit; /reset begins a new conversation"
    assert written.count("\n") == 4 and _said(chat)[0] == ("user", "5")


def test_a_system_message_without_a_place_is_refused_at_once():
    with pytest.raises(ValueError, match="no place for a system message"):
        _talk([], template="koala", system="Be kind.")
    source = "{% for m in messages %}{% if m.content %}- {{ m.content }}{% endif %}{% endfor %}"
    Chat(Parrot(JinjaTemplate(source, ByteTokenizer())), system="Be kind.")
    chat, _, _, told = _talk(["/system Be kind.", "one"], template="koala")
    assert "no place for a system message" in told[0] and len(chat.messages) == 2


def test_quality_is_that_of_the_answers_to_come():
    lines = ["one", "/quality bad", "two", "/quality", "three", "/quality best"]
    chat, lm, _, told = _talk(lines, template="koala")
    one = "BEGINNING OF CONVERSATION: USER: one GPT:"
    two = one + "You said one.USER: two"
    three = two + " GPT:You said two.USER: three GPT:"  # training never marks an earlier answer
    assert lm.prompts == [one, two + " An Unhelpful Answer:", three]
    assert "no marker for the quality 'best'" in told[2]
    qualities = [m.get("quality") for m in chat.messages if m["role"] == "assistant"]
    assert qualities == [None, "bad", None]
    _, _, _, told = _talk(["/quality bad"], template="vicuna")
    assert "no marker" in told[0] and "koala" in told[0]
    with pytest.raises(ValueError, match="no marker"):
        Chat(lm, quality="best")
