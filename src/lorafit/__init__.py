"""lorafit: LoRA fine-tuning of Hugging Face causal language models, in plain PyTorch."""
