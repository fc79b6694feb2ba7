"""What several tests share: tiny models, the reference, crashes, damage, a malformed corpus."""
