"""Pretraining of BERT and GPT models with DeepSpeed, and what is done with the models afterwards."""
