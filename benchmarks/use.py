"""generate and score beside transformers called directly, on one thread, in one process.

python benchmarks/use.py                                 on exported/demo-gpt, about a minute
python benchmarks/use.py --model exported/X --repeats 9

text       one greedy text: model.generate and decode
stream     the same as it is made: with transformers' TextStreamer
prompts    16 prompts of different lengths: model.generate of one after the other
lines      log-probabilities of 64 lines: model(labels=...) of one after the other

The programs take turns; a row shows medians of processor time a token (neighbours hardly change it) and their ratio.
Both get the same ids and make the same number of tokens.
"""

import argparse
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pipeline.exported import Exported, load_exported
from pipeline.generate import Settings, continuations
from pipeline.likelihood import token_log_probabilities

ROWS = ("text", "stream", "prompts", "lines")
NEW_TOKENS = 120
PROMPTS = ["Return the mean of the array elements along the given axis. "[: 4 * length] for length in range(1, 15)]
PROMPTS += ["Parameters", "Raises"]
LINES = [f"{prompt}{number}" for number, prompt in enumerate(PROMPTS * 4)]


def programs(exported: Exported) -> dict[str, tuple[Callable[[], int], Callable[[], int]]]:
    """By row, transformers' and ours; each returns how many tokens it made or scored."""
    import torch
    from transformers import AutoTokenizer, TextStreamer

    model, end = exported.model, exported.tokenizer.special.end_of_document
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)

    def directly(prompts: list[str], streamer: bool = False) -> int:
        made = 0
        for prompt in prompts:
            ids = torch.tensor([[end, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                pad_token_id=model.config.pad_token_id,
                **({"streamer": Quiet(tokenizer)} if streamer else {}),
            )
            tokenizer.decode(output[0])
            made += output.shape[1] - ids.shape[1]
        return made

    class Quiet(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pass

    def ours(prompts: list[str], stream: bool = False) -> int:
        settings = Settings(max_new_tokens=NEW_TOKENS, temperature=0)
        made = continuations(exported, prompts, settings, (lambda text: None) if stream else None)
        return sum(text.tokens for _, texts in made for text in texts)

    def losses() -> int:
        scored = 0
        for line in LINES:
            ids = torch.tensor([[end, *tokenizer(line, add_special_tokens=False)["input_ids"]]])
            with torch.no_grad():
                float(model(input_ids=ids, labels=ids).loss)
            scored += ids.shape[1] - 1
        return scored

    def scores() -> int:
        found = token_log_probabilities(model, exported.encoder.encode_batch(LINES), end)
        return sum(len(of_line.ranks) for of_line in found)

    return {
        "text": (lambda: directly(PROMPTS[:1]), lambda: ours(PROMPTS[:1])),
        "stream": (lambda: directly(PROMPTS[:1], True), lambda: ours(PROMPTS[:1], True)),
        "prompts": (lambda: directly(PROMPTS), lambda: ours(PROMPTS)),
        "lines": (losses, scores),
    }


def seconds_a_token(program: Callable[[], int]) -> float:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    began = spent()
    tokens = program()
    return (spent() - began) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("exported/demo-gpt"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    arguments = parser.parse_args()
    exported = load_exported(arguments.model, "causal")

    import torch

    torch.set_num_threads(1)
    # Texts are compared by the token, so none may end before the others.
    exported.model.generation_config.eos_token_id = None
    print(f"{arguments.model}, {exported.model.dtype}, one thread, medians of {arguments.repeats}")
    found = programs(exported)
    for name in arguments.only:
        theirs, ours = found[name]
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.repeats + 1):
            for kept, program in zip(times, (theirs, ours), strict=True):
                kept.append(seconds_a_token(program))
        directly, own = (statistics.median(kept[1:]) for kept in times)  # the first warms up
        print(f"{name:8} transformers {1e3 * directly:7.3f} ms a token   ours {1e3 * own:7.3f}   {directly / own:.2f}x")


if __name__ == "__main__":
    main()
