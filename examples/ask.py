"""Send a prompt to a served model with the openai client, after a document if one is given; print the continuation.

vllm serve EXPORT
python examples/ask.py EXPORT "It is a truth universally acknowledged, that" [--document FILE] [--url URL]
"""

import argparse
import sys
from pathlib import Path

import openai


def main() -> None:
    """Print the continuation, and on stderr the number of tokens read and written."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="name of the model, as given to `vllm serve`")
    parser.add_argument("prompt", help="the prompt; - reads it from stdin")
    parser.add_argument("--document", type=Path, help="a text to put before the prompt")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.document is not None:
        prompt = f"{options.document.read_text(encoding='utf-8')}\n\n{prompt}"
    client = openai.OpenAI(base_url=options.url, api_key="none")
    answer = client.completions.create(model=options.model, prompt=prompt, max_tokens=options.max_tokens, temperature=0)
    print(answer.choices[0].text)
    if answer.usage is not None:
        print(f"read {answer.usage.prompt_tokens} tokens, wrote {answer.usage.completion_tokens}", file=sys.stderr)


if __name__ == "__main__":
    main()
