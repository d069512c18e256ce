"""Learn RoPE's numbers with TRL's SFTTrainer, on rows that are packed from several documents.

pip install trl
python examples/trl_sft.py MODEL DOCUMENTS.jsonl OUTPUT --window 32768
yarn-tune export OUTPUT/adapter
"""

import argparse

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from yarn_tune.adapter import YarnTuneConfig


def main(words: list[str] | None = None) -> SFTTrainer:
    """Train, save the adapter, return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("documents", help="a .jsonl file with a field `text`")
    parser.add_argument("output")
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--query-gains", default="none", help="none, layer, head, pair or pair_phase")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(words)

    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            save_steps=options.save_steps,
            per_device_train_batch_size=1,
            max_length=options.window,
            packing=True,
            packing_strategy="bfd_split",  # keeps every token
            bf16=False,  # the frozen weights have their own dtype already
            learning_rate=options.learning_rate,  # of log s, log t, ...: a step moves a number by about 1%
            weight_decay=0.0,
            logging_steps=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},  # layers share cos and sin
            model_init_kwargs={"dtype": "auto"},
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=options.documents, split="train"),
        peft_config=YarnTuneConfig(window=options.window, query_gains=options.query_gains),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(f"{options.output}/adapter")
    return trainer


if __name__ == "__main__":
    main()
