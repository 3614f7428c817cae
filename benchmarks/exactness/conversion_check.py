"""Checks the conversion of the demo model against other implementations; exits 1 if anything differs.

    python -m benchmarks.exactness.conversion_check

Token ids of 30 texts with llama.cpp's tokenizer and with tiktoken; logits on a prompt with transformers' own load of
the GGUF file (about a minute), which shares only the gguf package's dequantisation with ours. The references go to a
folder that is deleted afterwards (300 MB of download). llama.cpp's wheel wants the C++ library of GCC 13; where it is
older, that line says so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tfserve.model.loading.demo import demo_gguf_file, prepare_demo_model

LIMIT = 1e-4
PACKAGES = {
    "llama.cpp": ["llama-cpp-cffi==0.4.42", "cffi", "pycparser"],
    "tiktoken": ["tiktoken"],
    "transformers": ["accelerate"],
}
QUESTION = "Why is the sky blue?"
TEXTS = [
    QUESTION,
    "In 1969, 2 people walked on the Moon; 384,400 km away.",
    "3.14159265358979 + 2.71828e-10 = ?",
    "Call +49 (0)30 1234567 or 0x1F4A9, 100% sure, v2.0.1-rc3",
    "Year2024month12day31 A1B2C3 ½ ² Ⅷ ٣ 五 ①",
    "It's what they're saying: we'll, I'd, you've, I'm, don't, SHE'S, y'all'd've",
    "def f(x: int) -> list[int]:\n    return [i ** 2 for i in range(x) if i % 3 == 0]\n",
    '#include <stdio.h>\nint main(void) {\n\tprintf("%d\\n", 42);\n\treturn 0;\n}\n',
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name HAVING COUNT(*) > 1;",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\u00e9"}}',
    "<div class=\"x\">\n  <a href='#'>link</a> &amp; &lt;\n</div>",
    "Привет, как дела? Съешь ещё этих мягких французских булок.",
    "你好，世界。今天天气很好，我们去公园吧！",
    "こんにちは、世界。カタカナとひらがな、漢字。",
    "안녕하세요 세계, 한국어 텍스트입니다.",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "שלום עולם, מה שלומך?",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก วันนี้อากาศดี",
    "Ελληνικά: αβγδε, Ünïcödé: straße, naïve café, e\u0301 vs é, ﬁ",
    "🙂 🎉🎉 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️",
    "   leading, trailing   ",
    "a  b   c    d\t\te\n\n\nf \n g\r\nh\u00a0i\u3000j\u200bk",
    "\n",
    " ",
    "\t \t\n  \n\t",
    "!!!???...---___***///\\\\\\|||~~~```",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    "<|im_start |> <repo_name>x<file_sep>  <not_a_token>",
    "antidisestablishmentarianism supercalifragilisticexpialidocious zzzzzzzzzzzzqqqqqqqq",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-logits", action="store_true", help="compare token ids only")
    args = parser.parse_args()
    folder = prepare_demo_model()
    results = [compare_ids(folder, name) for name in ("llama.cpp", "tiktoken")]
    if not args.skip_logits:
        results.append(compare_logits(folder))
    return 0 if False not in results else 1


def compare_logits(folder: Path) -> bool:
    """Largest difference over all positions of a question and its greedy answer; prints the answer too."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    print(f"{QUESTION}\n  {tokenizer.decode(answer[0, prompt['input_ids'].shape[1] :], skip_special_tokens=True)}")
    with torch.no_grad():
        ours = model(answer).logits[0]
    theirs = torch.tensor(reference("transformers", answer[0].tolist()))
    difference = float((ours - theirs).abs().max())
    print(f"logits of {len(ours)} positions against transformers' gguf_file=: max abs difference {difference:.3g}")
    return difference <= LIMIT


def compare_ids(folder: Path, name: str) -> bool | None:
    """Whether all ids are equal; None if the other tokenizer cannot run here."""
    try:
        others = reference(name, TEXTS)
    except subprocess.CalledProcessError as error:
        print(f"ids against {name}: not run ({error.stderr.strip().splitlines()[-1]})")
        return None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    different = 0
    for text, theirs in zip(TEXTS, others, strict=True):
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            different += 1
            print(f"  {text!r}\n    ours   {ours}\n    theirs {theirs}")
    total = sum(map(len, others))
    print(f"ids against {name}: {len(TEXTS) - different} of {len(TEXTS)} texts equal ({total} tokens)")
    return different == 0


def reference(name: str, inputs: list[Any]) -> list[Any]:
    """The reference's result for the inputs; its packages go to a folder that is deleted afterwards."""
    script = Path(__file__).with_name("conversion_references.py")
    with tempfile.TemporaryDirectory() as packages:
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", packages]
        run([*install, *PACKAGES[name]], {})
        request = json.dumps({"gguf": str(demo_gguf_file()), "inputs": inputs})
        made: list[Any] = json.loads(run([str(script), name], {"PYTHONPATH": packages}, request))
    return made


def run(arguments: list[str], environment: dict[str, str], stdin: str = "") -> str:
    command = [sys.executable, *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True, env=environment).stdout


if __name__ == "__main__":
    sys.exit(main())
