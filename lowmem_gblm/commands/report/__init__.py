"""The structure of masks: measured from outputs, said in sentences, shown on a page."""
