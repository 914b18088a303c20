"""Where bytes come from: files of registry packages, local paths, the Hugging Face hub."""
