"""An emoji is several tokens, none of them a character: `python -m docs.experiments.half_emoji`."""

from transformers import AutoTokenizer

from streaming_bots.generation.text_decoder import TextDecoder
from streaming_bots.models.source import BUNDLED_FOLDER

REPLY = "A 🐢 says 你好!"


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_FOLDER)
    tokens = tokenizer(REPLY)["input_ids"]
    print("The turtle's token ids:", tokenizer("🐢")["input_ids"])
    print("each token by itself:", "".join(tokenizer.decode(token) for token in tokens))
    decoder = TextDecoder(tokenizer)
    pieces = [decoder.step(token) for token in tokens]
    print("our decoder:", "".join(pieces))
    print("its pieces:", pieces)


if __name__ == "__main__":
    main()
