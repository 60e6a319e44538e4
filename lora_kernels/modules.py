LoRALinear = apply_lora = trainable_parameters = None
