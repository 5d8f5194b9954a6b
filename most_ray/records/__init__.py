"""Records, the input of training: every JSON form parsed and checked, the prompt template, tokenizers, ASR to TTS records."""
