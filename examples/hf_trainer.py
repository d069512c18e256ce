"""Learn RoPE's numbers with the Trainer of transformers, on documents that are packed without padding.

python examples/hf_trainer.py MODEL DOCUMENTS.jsonl OUTPUT --window 32768
yarn-tune export OUTPUT/adapter
"""

import argparse

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from yarn_tune.adapter import YarnTuneConfig


def main(words: list[str] | None = None) -> Trainer:
    """Train, save the adapter, return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("documents", help="a .jsonl file with a field `text`")
    parser.add_argument("output")
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--query-gains", default="none", help="none, layer, head, pair or pair_phase")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=1, help="documents per step and device")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(words)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    base.config.use_cache = False  # with a cache, packed documents attend to each other
    model = get_peft_model(base, YarnTuneConfig(window=options.window, query_gains=options.query_gains))

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"], truncation=True, max_length=options.window)["input_ids"]}

    documents = load_dataset("json", data_files=options.documents, split="train")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            save_steps=options.save_steps,
            per_device_train_batch_size=options.rows,
            learning_rate=options.learning_rate,  # of log s, log t, ...: a step moves a number by about 1%
            weight_decay=0.0,
            logging_steps=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},  # layers share cos and sin
            report_to=[],
        ),
        train_dataset=documents.map(tokens, batched=True, remove_columns=documents.column_names),
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(f"{options.output}/adapter")
    return trainer


if __name__ == "__main__":
    main()
