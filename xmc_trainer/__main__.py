from xmc_trainer.commands.cli import main

main()
