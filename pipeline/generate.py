"""`python -m pipeline.generate`: text from an exported GPT."""

import argparse
import sys
from pathlib import Path

from data_prep.errors import UserError

EXAMPLES = """\
examples:
  python -m pipeline.generate --model exported/demo-gpt --prompt "Return the mean of"
  python -m pipeline.generate --model exported/demo-gpt --prompt "Parameters" --temperature 0 --max_new_tokens 50
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.generate",
        description="Continue prompts with an exported causal model; the text streams to the terminal.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="H", help="Hugging Face folder of a causal model")
    parser.add_argument("--prompt", required=True, nargs="+", metavar="TEXT", help="texts to continue")
    parser.add_argument(
        "--max_new_tokens", type=int, default=100, metavar="N", help="tokens to add at most (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token (default: %(default)s)"
    )
    parser.add_argument(
        "--top_k", type=int, default=50, metavar="K", help="sample from the K likeliest (default: %(default)s)"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, metavar="P", help="and from this share of the mass (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of the sampling (default: %(default)s)")
    return parser


def generate(arguments: argparse.Namespace) -> None:
    """Prints each prompt and its continuation; raises UserError for a folder that is no causal model, or a prompt
    that fills the model's positions."""
    if not (arguments.model / "config.json").exists():
        raise UserError(f"--model {arguments.model} is no Hugging Face model folder; make one with pipeline.export")
    if arguments.temperature < 0:
        raise UserError(f"--temperature is {arguments.temperature}, expected 0 or more")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(arguments.model)
    if not any(name.endswith(("LMHeadModel", "ForCausalLM")) for name in config.architectures or []):
        raise UserError(f"--model {arguments.model} holds a {config.architectures}, expected a causal language model")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, config=config)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
        }
    torch.manual_seed(arguments.seed)
    for prompt in arguments.prompt:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        room = positions - inputs["input_ids"].shape[1]
        if room < 1:
            raise UserError(f"the prompt has {positions - room} tokens, the model {positions} positions; shorten it")
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=min(arguments.max_new_tokens, room),
            pad_token_id=config.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )


def main(argv: list[str]) -> int:
    try:
        generate(_parser().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
