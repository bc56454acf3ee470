"""What travels inside the package, so that everything runs without a network.

Lives here: the reference model with its tokenizer (``model/``, trained by
``tools/train_reference.py``), the text that every Python carries (`stdlib_text`), and the outlier
profiles (``outlier_profiles.json``, made by ``tools/make_outlier_profiles.py``).
"""
