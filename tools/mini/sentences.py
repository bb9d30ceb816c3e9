"""What `mini` is told about its 40 training tasks, and the paraphrases that it is tested with.

No sentence here is an instruction of MT10 or a near copy of one (tests/test_mini.py compares their
content words): MT10's tasks are unseen in pictures and in words.
"""

TRAINING_SENTENCES: dict[str, tuple[str, ...]] = {
    "assembly-v3": (
        "Pick up the ring and put it over the post.",
        "Lift the nut and lower it onto the rod.",
        "Fit the wrench's hole around the upright stick.",
        "Assemble the nut with the pole.",
    ),
    "basketball-v3": (
        "Dunk the basketball into the hoop.",
        "Throw the ball through the basket.",
        "Carry the orange ball up to the net and drop it in.",
        "Score with the ball.",
    ),
    "bin-picking-v3": (
        "Move the cube from one bin to the other.",
        "Take the block out of the left box and drop it into the right one.",
        "Transfer the object between the two containers.",
        "Grasp the item in the bin and release it in the neighbouring bin.",
    ),
    "box-close-v3": (
        "Put the lid on the box.",
        "Cover the container with its lid.",
        "Grab the cover and close the box with it.",
        "Seal the wooden crate.",
    ),
    "button-press-topdown-wall-v3": (
        "Go over the wall and push the switch down.",
        "Drive the red knob downwards behind the barrier.",
        "Depress the round switch behind the brick wall from above.",
        "Get past the wall and hit the buzzer.",
    ),
    "button-press-v3": (
        "Push the red knob into the machine.",
        "Drive the switch into its housing.",
        "Hit the buzzer on the front of the box.",
        "Poke the switch until it clicks.",
    ),
    "button-press-wall-v3": (
        "Go around the wall and push the switch in.",
        "Hit the buzzer that hides behind the barrier.",
        "Poke the red knob behind the bricks.",
        "Bypass the obstacle and drive the switch into its housing.",
    ),
    "coffee-button-v3": (
        "Start the coffee machine.",
        "Switch the espresso maker on.",
        "Hit the switch on the coffee maker.",
        "Poke the brewer's start key.",
    ),
    "coffee-pull-v3": (
        "Pull the mug away from the coffee machine.",
        "Drag the cup towards you.",
        "Take the coffee cup out from under the machine.",
        "Move the mug back from the espresso maker.",
    ),
    "coffee-push-v3": (
        "Push the mug under the coffee machine.",
        "Slide the cup below the spout.",
        "Put the coffee cup beneath the machine.",
        "Move the mug to the espresso maker.",
    ),
    "dial-turn-v3": (
        "Rotate the dial.",
        "Turn the knob half way around.",
        "Twist the dial by 180 degrees.",
        "Spin the round controller.",
    ),
    "disassemble-v3": (
        "Take the nut off the rod.",
        "Lift the ring from the post.",
        "Disassemble the nut and the pole.",
        "Remove the wrench from the upright stick.",
    ),
    "door-close-v3": (
        "Shut the gate.",
        "Swing the panel back until it is shut.",
        "Close the cupboard's side.",
        "Bring the hinged panel back into its frame.",
    ),
    "door-lock-v3": (
        "Lock the safe.",
        "Turn the latch clockwise so that it locks.",
        "Bolt the entrance.",
        "Rotate the lock into its locked position.",
    ),
    "door-unlock-v3": (
        "Unlock the safe.",
        "Turn the latch counter-clockwise so that it unlocks.",
        "Release the bolt of the entrance.",
        "Rotate the lock into its free position.",
    ),
    "faucet-close-v3": (
        "Turn the tap off.",
        "Rotate the faucet's handle clockwise.",
        "Shut off the water.",
        "Close the faucet.",
    ),
    "faucet-open-v3": (
        "Turn the tap on.",
        "Rotate the faucet's handle counter-clockwise.",
        "Let the water run.",
        "Open the faucet.",
    ),
    "hammer-v3": (
        "Hammer the nail into the wall.",
        "Hit the screw with the hammer.",
        "Drive the nail in with the tool.",
        "Grab the mallet and knock the pin into the block.",
    ),
    "hand-insert-v3": (
        "Put the hand into the hole.",
        "Lower the gripper into the gap in the table.",
        "Stick the fingers in the opening.",
        "Sink the robot's hand below the surface.",
    ),
    "handle-press-side-v3": (
        "Press the lever down from its side.",
        "Lower the handle sideways.",
        "Force the side bar downwards.",
        "Push the sideways grip towards the table.",
    ),
    "handle-press-v3": (
        "Press the handle down.",
        "Lower the bar.",
        "Force the grip downwards.",
        "Bring the handle to its lowest position.",
    ),
    "handle-pull-side-v3": (
        "Pull the side handle up.",
        "Raise the sideways grip.",
        "Lift the bar at its side.",
        "Bring the side handle to its highest position.",
    ),
    "handle-pull-v3": (
        "Pull the handle up.",
        "Raise the bar.",
        "Lift the grip.",
        "Bring the handle to its highest position.",
    ),
    "lever-pull-v3": (
        "Pull the lever upwards.",
        "Lift the lever by ninety degrees.",
        "Raise the crank.",
        "Turn the long lever up.",
    ),
    "peg-unplug-side-v3": (
        "Unplug the peg.",
        "Pull the plug out of the socket.",
        "Remove the pin from the hole in the side.",
        "Extract the rod from the block.",
    ),
    "pick-out-of-hole-v3": (
        "Lift the disc out of the hole.",
        "Take the object from the pit up into the air.",
        "Grab what lies in the hole and raise it.",
        "Retrieve the piece from the cavity.",
    ),
    "pick-place-wall-v3": (
        "Lift the cylinder over the wall.",
        "Carry the block across the barrier and set it down.",
        "Bring the object to the other side of the bricks.",
        "Hold the piece above the obstacle at its target.",
    ),
    "plate-slide-back-side-v3": (
        "Slide the plate out of the cabinet to the side.",
        "Get the dish sideways out of the net.",
        "Drag the plate away from the side goal.",
        "Remove the disc from the rack towards the side.",
    ),
    "plate-slide-back-v3": (
        "Slide the plate out of the cabinet.",
        "Drag the dish back out of the net.",
        "Pull the plate towards the robot.",
        "Remove the disc from the rack.",
    ),
    "plate-slide-side-v3": (
        "Slide the plate sideways into the cabinet.",
        "Shove the dish into the net at the side.",
        "Move the plate into the rack on its side.",
        "Send the disc sideways into the box.",
    ),
    "plate-slide-v3": (
        "Slide the plate into the cabinet.",
        "Shove the dish into the net.",
        "Move the plate into the rack.",
        "Send the disc forward into the box.",
    ),
    "push-back-v3": (
        "Bring the cylinder back towards the robot.",
        "Drag the block backwards to the mark.",
        "Return the object to the near spot.",
        "Sweep the piece towards the base.",
    ),
    "push-wall-v3": (
        "Shove the cylinder around the wall.",
        "Get the block past the barrier to its mark.",
        "Steer the object by the bricks.",
        "Move the piece behind the obstacle.",
    ),
    "reach-wall-v3": (
        "Move the gripper past the wall to the red ball.",
        "Bring the hand behind the barrier.",
        "Touch the marker beyond the bricks.",
        "Hover around the obstacle at the mark.",
    ),
    "shelf-place-v3": (
        "Put the cube on the shelf.",
        "Lift the block up onto the rack.",
        "Store the object on the board.",
        "Set the blue box down on the ledge.",
    ),
    "soccer-v3": (
        "Kick the ball into the net.",
        "Score in soccer.",
        "Shove the football between the posts.",
        "Roll the ball over the line.",
    ),
    "stick-pull-v3": (
        "Pull the bottle with the stick.",
        "Hook the thermos with the rod and drag it back.",
        "Grab the stick and bring the kettle closer with it.",
        "Use the tool to draw the container near.",
    ),
    "stick-push-v3": (
        "Shove the bottle with the stick.",
        "Take the rod and move the thermos forward with it.",
        "Grab the stick and send the kettle away with it.",
        "Use the tool to drive the container ahead.",
    ),
    "sweep-into-v3": (
        "Sweep the cube into the hole.",
        "Brush the block into the pit.",
        "Make the object fall into the opening in the table.",
        "Wipe the piece into the gap.",
    ),
    "sweep-v3": (
        "Sweep the cube off the table.",
        "Brush the block over the edge.",
        "Clear the object from the desk.",
        "Wipe the piece away.",
    ),
}

# The way back, where no other training task has it.
OPPOSITE_SENTENCES: dict[str, tuple[str, ...]] = {
    "door-close-v3": ("Swing the gate wide.", "Move the hinged panel out of its frame."),
    "box-close-v3": ("Take the lid off the box.", "Uncover the container."),
    "lever-pull-v3": ("Push the lever downwards.", "Lower the crank."),
    "plate-slide-side-v3": ("Slide the plate out of the cabinet to the side.",),
    "coffee-push-v3": ("Drag the cup towards you.",),
    "coffee-pull-v3": ("Slide the cup below the spout.",),
    "handle-press-v3": ("Raise the bar.", "Pull the handle up."),
    "handle-pull-v3": ("Lower the bar.", "Press the handle down."),
    "faucet-open-v3": ("Turn the tap off.", "Rotate the faucet's handle clockwise."),
    "faucet-close-v3": ("Turn the tap on.", "Rotate the faucet's handle counter-clockwise."),
    "door-lock-v3": ("Unlock the safe.",),
    "door-unlock-v3": ("Lock the safe.",),
}

# Only for the evaluation on MT10.
MT10_PARAPHRASES: dict[str, tuple[str, ...]] = {
    "button-press-topdown-v3": ("Push the button down.", "Hit the red button from above."),
    "door-open-v3": ("Pull the door open.", "Swing the door outwards on its hinge."),
    "drawer-close-v3": ("Shut the drawer.", "Slide the drawer back in."),
    "drawer-open-v3": ("Pull the drawer out.", "Slide the drawer open by its handle."),
    "peg-insert-side-v3": ("Put the peg into the hole.", "Plug the stick in from the side."),
    "pick-place-v3": ("Lift the puck to the target.", "Grab the object and carry it to the goal."),
    "push-v3": ("Slide the puck to the target.", "Shove the object over to the goal."),
    "reach-v3": ("Move the hand to the target.", "Bring the gripper to the goal."),
    "window-close-v3": ("Shut the window.", "Slide the window shut."),
    "window-open-v3": ("Slide the window open.", "Pull the window to the side."),
}

STOP_WORDS = frozenset("a an the to of from with and its it in on into onto over up down by at for "
                       "until is so that one".split())


def content_words(sentence: str) -> frozenset[str]:
    """The words that carry a sentence's meaning, in lower case."""
    words = "".join(c if c.isalnum() else " " for c in sentence.lower()).split()
    return frozenset(words) - STOP_WORDS


def overlap(a: str, b: str) -> float:
    """Jaccard index of two sentences' content words, 0 to 1."""
    first, second = content_words(a), content_words(b)
    return len(first & second) / max(len(first | second), 1)
