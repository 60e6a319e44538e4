load_adapter = save_adapter = None
