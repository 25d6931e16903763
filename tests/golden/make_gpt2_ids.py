"""Make gpt2_ids.json: ids of many kinds of text by OpenAI's tiktoken with GPT-2's files.

For maintainers, in an environment with tiktoken (the tests need none), with the folder that holds
vocab.bpe and encoder.json:

    python tests/golden/make_gpt2_ids.py data/gpt2

The file is a list of {"name", "text", "ids"}. Its last text is all the others, line after line.
"""

import json
import os
import sys
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

PATH = Path(__file__).with_name("gpt2_ids.json")
END_OF_TEXT = "<|endoftext|>"
SPACES = "\t\x0b\x0c\x1c\x1f \x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"

TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog. Colourless green ideas sleep "
    "furiously -- or so (some) say; antidisestablishmentarianism, e.g., U.S.A.?!",
    "verse": "ROMEO:\nBut, soft! what light through yonder window breaks?\n"
    "It is the east, and Juliet is the sun.\n\nJULIET:\nAy me!\n",
    "contractions": "I'm, you're, he's, she'd, we've, they'll, don't, DON'T, 'tis, rock'n'roll, "
    "y'all'd've 'S 'll'll ' s '' 's's don\u2019t",
    "code": "def f(x: int = 0x1F) -> list[str]:\n    if x >= 10**6:\n        return [f'{x!r}']\n"
    "\telse:\n\t\tpass  # nothing\n\n\nfor(int i=0;i<n;++i){a[i]<<=2;}\r\n\r\n</div>\n",
    "numbers": "0 1 12 123 1234 12345 3.14159 -1e-10 1,000,000 2024-05-20 \u00b2\u2153\u2167 "
    "\u0663\u0664 abc123def 0b1010 1st",
    "spaces": "".join("x" + " " * n for n in range(1, 18)) + "x",
    "blank": "   leading\n trailing   \n \n  \n\t\n\n\n\nafter \t \n\t mixed\t\t\t\ttabs \t\n ",
    "newlines": "".join("y" + "\n" * n for n in range(1, 10)) + "\r\r\n\n\r",
    "kinds of space": "".join(f"a{c}b {c}c{c} d{c}{c}\n{c}" for c in SPACES),
    "European": "Falsches \u00dcben von Xylophonmusik qu\u00e4lt jeden gr\u00f6\u00dferen Zwerg. "
    "\u00bfD\u00f3nde est\u00e1 el ni\u00f1o? \u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438"
    "\u0440! \u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1",
    "other scripts": "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \uc548"
    "\ub155 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924"
    "\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \U00010330\U00010331",
    "emoji": "\U0001f600\U0001f600 ok\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d"
    "\U0001f467 \u2764\ufe0f\U0001f1eb\U0001f1f7!",
    "combining": "e\u0301 a\u0308\u0304 Z\u0351\u036b\u0343 \u1e69 s\u0323\u0307",
    "control": "nul\x00bell\x07\x1b[0m\x7f \ue000\ufffd\U0010ffff",
    "repeats": "a" * 50 + " " + "ab" * 30 + " " + "=" * 70 + "\n" + "-" * 33 + "!" * 9,
    "end of text": f"one{END_OF_TEXT}two {END_OF_TEXT}\n{END_OF_TEXT}{END_OF_TEXT} <|endoftext| >",
    "nothing": "",
}


def main(folder: str) -> None:
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # the files are here already
    files = (str(Path(folder, name)) for name in ("vocab.bpe", "encoder.json"))
    gpt2 = tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(*files),
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )
    texts = TEXTS | {"all": "\n".join(TEXTS.values())}
    golden = [
        {"name": name, "text": text, "ids": gpt2.encode(text, allowed_special={END_OF_TEXT})}
        for name, text in texts.items()
    ]
    PATH.write_text("[\n" + ",\n".join(map(json.dumps, golden)) + "\n]\n")
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, {len(golden[-1]['ids'])} ids in all")


if __name__ == "__main__":
    main(*sys.argv[1:])
