"""Who proposes tokens. Each drafter has one definition that training and serving share."""
