"""What quantization costs a real model: attention logits, softmax, perplexity.

Everything goes through the codec and the packed bytes that serve. Calibration and evaluation use different texts.
"""
