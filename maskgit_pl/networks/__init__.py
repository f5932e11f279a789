"""Plain ``nn.Module`` networks: tokenizer, quantizers, discriminator, feature networks and the transformer."""
