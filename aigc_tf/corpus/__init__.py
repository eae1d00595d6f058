"""Corpus: step 1 of the article, preprocessing. Files of Chinese text in, batches of token ids out.

In: files and folders, or documents, `list[str]`. Out: clean documents, words, a `Tokenizer`, a store of ids, batches
`int32 (B, T)`.
Public: `load_documents`, `iter_documents`, `load_corpus`, `clean`, `split`, `segment`, `keywords`, `load_stopwords`,
`remove_stopwords`, `load_user_dict`, `Tokenizer`, `make_store`, `open_store`, `make_dataset`.
"""
