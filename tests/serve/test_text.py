"""Text of a response is that of its tokens up to the first stop text that is complete, and nothing is shown that is taken back."""

from hypothesis import given
from hypothesis import strategies as st

from jaxllm.serve.text import ResponseText
from tests.serve.small_server import make_tokenizer

TOKENIZER = make_tokenizer()
# Few characters, so that stop texts begin, overlap and are cut by tokens.
TEXT = st.text(alphabet="ab\n汤", max_size=20)


@given(TEXT, st.lists(st.text(alphabet="ab\n汤", min_size=1, max_size=4), max_size=3))
def test_a_response_ends_before_the_stop_text_that_is_complete_first(text, stops):
    response = ResponseText(TOKENIZER, stops)
    shown = []
    for token in TOKENIZER.encode(text):
        shown.append(response.add(token))
        if response.stopped:
            break
    if not response.stopped:
        shown.append(response.finish())
    # Whichever is complete first ends the response: nothing more is drawn then.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    _, begin = min(ends, default=(0, len(text)))
    assert "".join(shown) == text[:begin]
    assert response.stopped == bool(ends)


@given(TEXT)
def test_without_stop_texts_whole_characters_come_at_once(text):
    response = ResponseText(TOKENIZER, [])
    so_far = b""
    shown = ""
    for token in TOKENIZER.encode(text):
        so_far += TOKENIZER.token_bytes(token)
        shown += response.add(token)
        assert shown == so_far.decode(errors="ignore")
